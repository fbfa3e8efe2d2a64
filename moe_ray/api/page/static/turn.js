// One answer while it is made: its text, its routing, how fast it comes, and how it ends.

import { Routing } from "./routing.js";
import { chatChunks } from "./server.js";

const STALL_MS = 1500;
const SHORTEST_S = 0.1; // tokens that came all at once say nothing about their rate

export class Turn {
  // `on`: {text(turn), routed(turn, count), stalled(turn, yes)}, called as things come.
  constructor(body, on) {
    this.text = "";
    this.routing = body.return_routed_experts ? new Routing() : null;
    this.facts = {};
    this._body = body;
    this._on = on;
    this._abort = new AbortController();
    this._clock = null;
    this._started = 0;
    this._firstAt = null;
    this._lastAt = 0;
    this._chunks = 0;
  }

  stop() {
    this._abort.abort();
  }

  // Run to the end; returns "done", "stopped", or the error that ended it. Never throws one of the server's.
  async run() {
    this._started = performance.now();
    this._watch();
    try {
      for await (const chunk of chatChunks(this._body, this._abort.signal)) this._take(chunk);
      return "done";
    } catch (error) {
      return error.name === "AbortError" ? "stopped" : error;
    } finally {
      clearTimeout(this._clock);
      this._on.stalled(this, false);
      this._measure();
    }
  }

  _take(chunk) {
    this._watch();
    this._on.stalled(this, false);
    if (chunk.usage) this.facts.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? "";
    if (text || choice?.logprobs) {
      this._firstAt ??= performance.now();
      this._lastAt = performance.now();
      this._chunks += 1;
    }
    if (choice?.finish_reason) this.facts.finish = choice.finish_reason;
    if (choice?.degraded_positions) this.facts.degraded = choice.degraded_positions.length;
    const routed = this.routing?.take(chunk) ?? 0;
    this.text += text;
    if (text) this._on.text(this);
    if (routed) this._on.routed(this, routed);
  }

  // A stream in which nothing comes waits for something: an expert that is gone, say.
  _watch() {
    clearTimeout(this._clock);
    this._clock = setTimeout(() => this._on.stalled(this, true), STALL_MS);
  }

  _measure() {
    if (this._firstAt === null) return;
    this.facts.tokens ??= this._chunks; // no usage came: the stream was cut
    this.facts.firstMs = this._firstAt - this._started;
    const seconds = (this._lastAt - this._firstAt) / 1000;
    if (this.facts.tokens > 1 && seconds > SHORTEST_S) this.facts.perSecond = (this.facts.tokens - 1) / seconds;
  }
}
