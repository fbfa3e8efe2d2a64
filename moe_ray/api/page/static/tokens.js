// An answer as its tokens: one is chosen with a click or with the arrow keys.

import { el } from "./dom.js";

// How a token is shown: what has no character of its own gets a sign.
export function shown(text) {
  return text === "" ? "·" : text.replaceAll("\n", "↵");
}

export class TokenView {
  constructor(routing, picked) {
    this._picked = picked;
    this._buttons = routing.tokens.map((token, index) =>
      el("button", {
        type: "button",
        class: "token",
        "aria-pressed": "false",
        "aria-label": `Token ${index + 1}: ${token.text.trim() || "blank"}`,
        tabindex: index === 0 ? "0" : "-1",
        textContent: shown(token.text),
        onclick: () => this._pick(index),
      }),
    );
    const lines = this._buttons.map((button, index) => [button, routing.tokens[index].text.includes("\n") ? el("br") : null]);
    const list = el("div", { class: "tokens", role: "group", "aria-label": "Tokens of the answer" }, lines.flat());
    list.addEventListener("keydown", (event) => this._key(event));
    this.box = el("div", {}, el("p", { class: "hint", textContent: "Pick a token, or walk with the arrow keys: the house shows where it went." }), list);
    this._at = 0;
    this._buttons[0]?.setAttribute("aria-pressed", "true");
  }

  _key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? this._buttons.length - 1 : step && this._at + step;
    if (to === undefined || to < 0 || to >= this._buttons.length) return;
    event.preventDefault();
    this._pick(to);
    this._buttons[to].focus();
  }

  _pick(index) {
    const before = this._buttons[this._at];
    before.setAttribute("aria-pressed", "false");
    before.tabIndex = -1;
    this._at = index;
    this._buttons[index].setAttribute("aria-pressed", "true");
    this._buttons[index].tabIndex = 0;
    this._picked(index);
  }
}
