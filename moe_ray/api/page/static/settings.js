// What a request says beside its messages: the system prompt, sampling, and whether its routing is recorded.

const STORED = "moe-ray.settings";

// name → label, bounds and help. A field that is left empty is not sent: the model's own default holds.
export const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, help: "0 always takes the likeliest token." },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1_000_000, step: 1, whole: true, help: "Of one answer." },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, help: "The likeliest tokens that add up to this." },
  { name: "top_k", label: "Top k", min: -1, max: 1_000_000, step: 1, whole: true, help: "So many of the likeliest; 0 means all." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, help: "At least this share of the likeliest one." },
  { name: "seed", label: "Seed", min: Number.MIN_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER, step: 1, whole: true, help: "The same seed, the same answer." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, help: "On tokens that were there." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, help: "For each time they were there." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: 0.05, help: "Above 1 avoids repetition." },
];
const MOST_STOPS = 16;

const DEFAULTS = { system: "", stop: "", values: {}, routing: true };

export function loadSettings() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    // damaged: the defaults
  }
  const values = {};
  for (const field of FIELDS) if (fault(field, stored.values?.[field.name]) === null) values[field.name] = stored.values?.[field.name];
  return {
    system: typeof stored.system === "string" ? stored.system : DEFAULTS.system,
    stop: typeof stored.stop === "string" ? stored.stop : DEFAULTS.stop,
    routing: typeof stored.routing === "boolean" ? stored.routing : DEFAULTS.routing,
    values,
  };
}

export function saveSettings(settings) {
  localStorage.setItem(STORED, JSON.stringify(settings));
}

// What is wrong with a value; null if nothing is. undefined: not set.
export function fault(field, value) {
  if (value === undefined) return null;
  if (typeof value !== "number" || !Number.isFinite(value)) return "a number, please";
  if (field.whole && !Number.isInteger(value)) return "a whole number, please";
  if (value < field.min || value > field.max) return `between ${field.min} and ${field.max}`;
  return null;
}

export function stopStrings(text) {
  return text.split("\n").filter((line) => line !== "").slice(0, MOST_STOPS);
}

// The body of a request for the next answer to `messages`.
export function requestBody(model, settings, messages) {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = {
    model,
    messages: [...system, ...messages.map(({ role, content }) => ({ role, content }))],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const [name, value] of Object.entries(settings.values)) if (value !== undefined) body[name] = value;
  const stops = stopStrings(settings.stop);
  if (stops.length) body.stop = stops;
  if (settings.routing) {
    // logprobs name each token by its bytes, so that text and routing can be laid side by side.
    body.logprobs = true;
    body.return_routed_experts = true;
    body.stream_options.continuous_usage_stats = true;
  }
  return body;
}

// In a few words, for the line below the message box.
export function summary(settings) {
  const said = [];
  if (settings.system.trim()) said.push("system prompt");
  for (const field of FIELDS) {
    const value = settings.values[field.name];
    if (value !== undefined) said.push(`${field.label.toLowerCase()} ${value}`);
  }
  if (stopStrings(settings.stop).length) said.push("stop strings");
  return said.join(" · ");
}
