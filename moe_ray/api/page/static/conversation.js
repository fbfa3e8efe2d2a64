// The open conversation: its messages on the page, and the answer that is being made, if there is one.

import { announce, Reader } from "./announce.js";
import { newChat, newMessage, saveChat } from "./chats.js";
import { byId, el } from "./dom.js";
import { AnswerView, userMessage } from "./message.js";
import { requestBody } from "./settings.js";
import { Turn } from "./turn.js";
import { names } from "./words.js";

const IDEAS = ["What is the capital of France?", "Write a haiku about rain.", "Explain photosynthesis to a child.", "Give me a recipe for pancakes."];
const NEAR_PX = 60;

export class Conversation {
  // `on`: {busy(yes), saved(), failed(error), storage(error), routed(turn, count), pick(routing, token)}; `state`:
  // {model, settings, house} as they are now.
  constructor(state, on) {
    this.chat = newChat();
    this._state = state;
    this._on = on;
    this._turn = null;
    this._routings = new Map(); // message id → Routing, until the page is left
    this._scroll = byId("scroll");
    this._list = byId("transcript");
    this._empty();
    addEventListener("pagehide", () => this._save(this.chat));
  }

  get busy() {
    return this._turn !== null;
  }

  open(chat) {
    this.stop();
    this.chat = chat;
    this._turn = null;
    this._on.pick(null, null);
    this._on.busy(false);
    this._draw();
    this._scroll.scrollTop = this._scroll.scrollHeight;
  }

  stop() {
    this._turn?.stop();
  }

  send(text) {
    this.chat.messages.push(newMessage("user", text));
    this._draw();
    this._answer();
  }

  _draw() {
    this._list.replaceChildren(...this.chat.messages.map((message) => this._item(message)));
    this._empty();
  }

  _item(message) {
    if (message.role === "user") return userMessage(message, { edit: (each, text) => this._edit(each, text) });
    const view = this._view(message);
    view.routing = this._routings.get(message.id) ?? null;
    view.settle();
    return view.item;
  }

  _view(message) {
    return new AnswerView(message, { again: (each) => this._again(each), pick: (routing, token) => this._on.pick(routing, token) });
  }

  _edit(message, text) {
    if (this.busy) return;
    this._cutAt(message);
    this.send(text);
  }

  _again(message) {
    if (this.busy) return;
    this._cutAt(message);
    this._draw();
    this._answer();
  }

  // Drop a message and all that follow it.
  _cutAt(message) {
    const at = this.chat.messages.indexOf(message);
    if (at >= 0) this.chat.messages.splice(at); // an answer that failed at its start is not among them
    this._on.pick(null, null);
  }

  async _answer() {
    const chat = this.chat;
    const body = requestBody(this._state.model, this._state.settings, chat.messages.filter((each) => each.content));
    const message = newMessage("assistant", "");
    const view = this._view(message);
    const reader = new Reader();
    this._list.append(view.item);
    this._empty();
    view.waiting();
    this._scroll.scrollTop = this._scroll.scrollHeight;
    chat.messages.push(message);
    this._save(chat);
    const turn = new Turn(body, {
      text: () => {
        message.content = turn.text;
        reader.grown(turn.text);
        const stick = this._atEnd();
        view.grow(() => stick && (this._scroll.scrollTop = this._scroll.scrollHeight));
      },
      routed: (_, fresh) => this._on.routed(turn, fresh),
      stalled: (_, yes) => view.stalled(yes ? this._waitingFor() : null),
    });
    this._turn = turn;
    this._on.busy(true);
    announce("Sent.");
    const end = await turn.run();
    message.content = turn.text;
    message.facts = turn.facts;
    if (end === "stopped") message.facts.finish = "stopped";
    const error = end === "done" || end === "stopped" ? null : end;
    if (turn.routing?.tokens.length) this._routings.set(message.id, turn.routing);
    if (!message.content && end !== "done") chat.messages.splice(chat.messages.indexOf(message), 1);
    this._save(chat);
    view.routing = turn.routing;
    const stick = this._atEnd();
    view.settle(error);
    if (stick) this._scroll.scrollTop = this._scroll.scrollHeight;
    if (this._turn === turn) {
      this._turn = null;
      this._on.busy(false);
    }
    reader.ended(turn.text, error ? "the answer broke off" : end === "stopped" ? "stopped" : "the answer is complete");
    if (error) this._on.failed(error);
  }

  _waitingFor() {
    const missing = this._state.house?.missing ?? [];
    return missing.length ? `Waiting for ${names(missing)}. The answer goes on as soon as it is back.` : "Waiting for the model …";
  }

  _save(chat) {
    chat.updated = Date.now();
    try {
      saveChat(chat);
    } catch (error) {
      this._on.storage(error);
    }
    this._on.saved();
  }

  _atEnd() {
    return this._scroll.scrollHeight - this._scroll.scrollTop - this._scroll.clientHeight < NEAR_PX;
  }

  _empty() {
    const box = byId("empty");
    box.hidden = this._list.childElementCount > 0;
    if (box.hidden || box.childElementCount) return;
    const ideas = IDEAS.map((text) => el("button", { type: "button", class: "button", onclick: () => this._state.model && !this.busy && this.send(text) }, text));
    box.append(
      el("h2", { textContent: "Ask the mixture something." }),
      el("p", { id: "about", textContent: "Every token is computed by a few experts, each in a process of its own. The house shows which ones, while they work." }),
      el("div", { class: "ideas" }, ideas),
    );
  }
}
