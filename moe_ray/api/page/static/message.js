// How one message looks: what the user said, or an answer with its figures, its faults and its tokens.

import { copyText, el, iconButton, say } from "./dom.js";
import { render } from "./markdown.js";
import { TokenView } from "./tokens.js";
import { count, duration, explain } from "./words.js";

// `on`: {edit(message, text)}
export function userMessage(message, on) {
  const item = el("li", { class: "message user" });
  const look = () => {
    const copy = iconButton("copy", "Copy", () => copyText(message.content, copy));
    const edit = iconButton("pencil", "Edit", () => change());
    item.replaceChildren(
      el("span", { class: "sr", textContent: "You said:" }),
      el("div", { class: "bubble", textContent: message.content }),
      el("div", { class: "foot" }, copy, edit),
    );
    return edit;
  };
  const change = () => {
    const text = el("textarea", { value: message.content, "aria-label": "Edit your message" });
    const save = () => (text.value.trim() ? on.edit(message, text.value) : text.focus());
    const cancel = () => look().focus();
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      }
    });
    const buttons = [el("button", { type: "button", class: "button", onclick: cancel }, "Cancel"), el("button", { type: "button", class: "button primary", onclick: save }, "Send")];
    item.replaceChildren(el("div", { class: "edit" }, text, el("div", { class: "edit-row" }, buttons)));
    text.focus();
    text.setSelectionRange(text.value.length, text.value.length);
  };
  look();
  return item;
}

export class AnswerView {
  // `on`: {again(message), pick(routing, token or null)}
  constructor(message, on) {
    this.message = message;
    this.routing = null;
    this._on = on;
    this._text = el("div", { class: "prose" });
    this._stall = el("p", { class: "stall", hidden: true });
    this._fault = el("div", { class: "fault", hidden: true });
    this._foot = el("div", { class: "foot", hidden: true });
    this.item = el("li", { class: "message answer" }, el("span", { class: "sr", textContent: "The model answered:" }), this._text, this._stall, this._fault, this._foot);
    this._tokens = null;
    this._frame = 0;
  }

  waiting() {
    this._text.replaceChildren(el("span", { class: "thinking", role: "img", "aria-label": "Waiting for the first token" }, el("i"), el("i"), el("i")));
    this._text.blocks = null;
  }

  // Show the text at the next frame: many tokens may come within one.
  grow(after = () => {}) {
    if (this._frame) return;
    this._frame = requestAnimationFrame(() => {
      this._frame = 0;
      this._show();
      after();
    });
  }

  stalled(text) {
    this._stall.hidden = !text;
    say(this._stall, text ?? "");
  }

  // The answer has ended, or was stored before; `error` is a ServerError or null.
  settle(error = null) {
    cancelAnimationFrame(this._frame);
    this._frame = 0;
    this.stalled(null);
    this._show();
    this._showFault(error);
    this._showFoot();
  }

  closeTokens() {
    if (this._tokens) this._toggleTokens();
  }

  _show() {
    if (!this._text.blocks) this._text.replaceChildren();
    if (!this._tokens) render(this._text, this.message.content);
  }

  _showFault(error) {
    this._fault.hidden = !error;
    if (!error) return;
    const { title, detail, wait } = explain(error);
    const button = el("button", { type: "button", class: "button", onclick: () => this._on.again(this.message) }, "Try again");
    this._fault.setAttribute("role", "alert");
    this._fault.replaceChildren(el("strong", { textContent: title }), el("p", { textContent: detail }), button);
    if (wait) this._countDown(button, wait);
  }

  _countDown(button, seconds) {
    if (!button.isConnected && seconds < 0) return;
    button.disabled = seconds > 0;
    button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
    if (seconds > 0) setTimeout(() => this._countDown(button, seconds - 1), 1000);
  }

  _showFoot() {
    const facts = this.message.facts ?? {};
    const copy = iconButton("copy", "Copy answer", () => copyText(this.message.content, copy));
    this._inspect = this.routing?.tokens.length
      ? iconButton("grid", "Inspect tokens", () => this._toggleTokens(), { "aria-pressed": "false" })
      : null;
    const said = [
      facts.tokens === undefined ? null : `${count(facts.tokens)} tokens`,
      facts.perSecond === undefined ? null : `${facts.perSecond.toFixed(1)} tokens/s`,
      facts.firstMs === undefined ? null : `first after ${duration(facts.firstMs)}`,
    ].filter(Boolean).map((text) => el("span", { textContent: text }));
    if (facts.finish === "length") said.push(el("span", { class: "warn", textContent: "cut at the most tokens" }));
    if (facts.finish === "stopped") said.push(el("span", { textContent: "stopped" }));
    if (facts.degraded) said.push(el("span", { class: "warn", textContent: `${count(facts.degraded)} tokens without an expert` }));
    const again = iconButton("again", "Answer again", () => this._on.again(this.message));
    this._foot.replaceChildren(...[copy, again, this._inspect, el("span", { class: "facts" }, said)].filter(Boolean));
    this._foot.hidden = false;
  }

  _toggleTokens() {
    const on = this._tokens === null;
    this._inspect.setAttribute("aria-pressed", String(on));
    this._tokens = on ? new TokenView(this.routing, (token) => this._on.pick(this.routing, token)) : null;
    this._text.replaceChildren();
    this._text.blocks = null;
    if (on) this._text.append(this._tokens.box);
    else this._show();
    this._on.pick(this.routing, on ? 0 : null);
  }
}
