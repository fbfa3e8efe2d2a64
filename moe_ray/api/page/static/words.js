// Errors and numbers in words.

const number = new Intl.NumberFormat("en");
export const count = (value) => number.format(Math.round(value));
export const percent = (share) => `${Math.round(100 * share)} %`;
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

export function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(milliseconds < 10_000 ? 1 : 0)} s`;
}

export function bytes(value) {
  return value < 1e9 ? `${Math.round(value / 2 ** 20)} MiB` : `${(value / 2 ** 30).toFixed(1)} GiB`;
}

export function names(list) {
  return list.length < 4 ? list.join(", ") : `${list.slice(0, 3).join(", ")} and ${list.length - 3} more`;
}

// What went wrong, for a person: {title, detail, wait} with the seconds to wait before another try, or null.
export function explain(error) {
  const wait = error.retryAfter ?? null;
  if (error.kind === "network") {
    return { title: "The connection was lost", detail: "What had arrived is kept. Check the network or the server, then try again.", wait: null };
  }
  if (error.kind === "stream") return { title: "The answer broke off", detail: error.message, wait: null };
  switch (error.status) {
    case 401: return { title: "An API key is needed", detail: error.message, wait: null };
    case 429: return { title: "The server is busy", detail: error.message, wait };
    case 503: return { title: "The model is not ready", detail: error.missing?.length ? `Missing: ${names(error.missing)}.` : error.message, wait };
    case 400: return { title: "The server did not accept this", detail: error.message, wait: null };
    default: return { title: "Something went wrong", detail: error.message, wait: null };
  }
}
