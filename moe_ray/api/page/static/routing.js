// Which experts each token of one answer went to, gathered from the chunks of its stream.
//
// The server tells rows by position: row i belongs to token i of prompt and output. Token j of the answer is at position
// (prompt tokens) + j. The answer's last token has no row unless another followed it, for nothing was computed for it.

import { fromBase64, parseNpy } from "./npy.js";

export class Routing {
  constructor() {
    this.tokens = []; // {text, bytes}: text has the characters that the token completes
    this.promptTokens = null;
    this.layers = 0;
    this.topK = 0;
    this._decoder = new TextDecoder();
    this._next = 0; // position of the next row
    this._early = []; // rows that came before the prompt's length was known
    this._rows = []; // of the answer's tokens, each [layers * topK]
  }

  // Take one chunk in; the number of answer tokens whose experts it made known.
  take(chunk) {
    if (chunk.usage) this.promptTokens = chunk.usage.prompt_tokens;
    const choice = chunk.choices?.[0];
    for (const entry of choice?.logprobs?.content ?? []) this._token(entry);
    const before = this._rows.length;
    if (choice?.routed_experts) this._take(choice.routed_experts_start, parseNpy(fromBase64(choice.routed_experts)));
    this._settle();
    return this._rows.length - before;
  }

  get known() {
    return this._rows.length;
  }

  // [layer][k] of a token; null where nothing was computed for it.
  of(token) {
    const row = this._rows[token];
    if (!row) return null;
    return Array.from({ length: this.layers }, (_, layer) => Array.from(row.subarray(layer * this.topK, (layer + 1) * this.topK)));
  }

  // How often the answer's tokens went to each (layer, expert): [layer * experts + expert].
  counts(experts) {
    const found = new Float64Array(this.layers * experts);
    for (const row of this._rows) row.forEach((expert, i) => (found[Math.floor(i / this.topK) * experts + expert] += 1));
    return found;
  }

  _token(entry) {
    const spelled = entry.bytes ? Uint8Array.from(entry.bytes) : new TextEncoder().encode(entry.token);
    this.tokens.push({ text: this._decoder.decode(spelled, { stream: true }), bytes: spelled });
  }

  _take(start, { shape, data }) {
    const [positions, layers, topK] = shape;
    if (start !== this._next) throw new Error(`experts from position ${start} on do not follow ${this._next}`);
    this.layers = layers;
    this.topK = topK;
    const width = layers * topK;
    for (let i = 0; i < positions; i++) this._early.push(data.subarray(i * width, (i + 1) * width));
    this._next += positions;
  }

  _settle() {
    if (this.promptTokens === null) return;
    let position = this._next - this._early.length;
    for (const row of this._early) if (position++ >= this.promptTokens) this._rows.push(row.slice());
    this._early = [];
  }
}
