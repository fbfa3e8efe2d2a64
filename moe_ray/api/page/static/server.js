// Requests to the server that the page comes from, with the user's API key where there is one.

import { events } from "./sse.js";

const KEY = "moe-ray.key"; // in sessionStorage: gone with the tab

export class ServerError extends Error {
  // kind: "http" (status is set), "network" (no answer, or it broke off), "stream" (the server ended it with an error)
  // key: the API key that was shown
  constructor(kind, message, { status = 0, retryAfter = null, missing = null, key = "" } = {}) {
    super(message);
    Object.assign(this, { kind, status, retryAfter, missing, key });
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

function url(path) {
  return new URL(path, document.baseURI);
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = apiKey.get();
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(url(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("network", "The server cannot be reached.");
  }
  if (response.ok) return response;
  throw await failure(response, key);
}

async function failure(response, key) {
  let message = `The server answered ${response.status}.`;
  let missing = null;
  try {
    const body = await response.json();
    if (body.error?.message) message = body.error.message;
    if (Array.isArray(body.missing)) missing = body.missing;
  } catch {
    // not JSON: the status says enough
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new ServerError("http", message, {
    status: response.status,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
    missing,
    key,
  });
}

export async function getJson(path) {
  return (await ask(path)).json();
}

// Change something: with what no other site's page can send.
export async function change(path, body) {
  const headers = { "Content-Type": "application/json", "X-Moe-Ray-Page": "1" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

// {ready, missing}: whether requests are served, and which parts are not up.
export async function health() {
  try {
    await ask("health");
    return { ready: true, missing: [] };
  } catch (error) {
    if (error.kind === "http" && error.missing) return { ready: false, missing: error.missing };
    throw error;
  }
}

// The chunks of a streamed chat completion. Throws ServerError, or AbortError once `signal` says so.
export async function* chatChunks(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  let ended = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        return;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError("stream", chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("network", "The connection was lost.");
  }
  if (!ended) throw new ServerError("network", "The connection was lost.");
}
