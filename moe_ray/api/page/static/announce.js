// What screen readers are told: an answer in whole sentences, every few seconds, and how it ended.

import { byId } from "./dom.js";

const EVERY_MS = 4000;

export function announce(text) {
  const box = byId("announcer");
  const line = document.createElement("p");
  line.textContent = text;
  box.append(line);
  while (box.childNodes.length > 3) box.firstChild.remove();
}

export class Reader {
  constructor() {
    this._told = 0;
    this._at = performance.now();
  }

  // `text`: the answer so far.
  grown(text) {
    if (performance.now() - this._at < EVERY_MS) return;
    const fresh = text.slice(this._told);
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => fresh.lastIndexOf(mark)));
    if (end < 0) return;
    this._say(fresh.slice(0, end + 1));
  }

  ended(text, how) {
    const rest = text.slice(this._told).trim();
    announce(rest ? `${rest} — ${how}` : how);
  }

  _say(text) {
    this._told += text.length;
    this._at = performance.now();
    if (text.trim()) announce(text.trim());
  }
}
