// The box that one writes in.

import { byId, icon, say } from "./dom.js";
import { summary } from "./settings.js";

const phone = matchMedia("(max-width: 760px)");

export class Composer {
  // `on`: {send(text), stop(), settings()}
  constructor(on) {
    this._on = on;
    this._box = byId("prompt");
    this._busy = false;
    this._ready = false;
    byId("send").append(icon("up"));
    byId("stop").append(icon("stop"));
    byId("open-settings").append(icon("sliders"), "Settings");
    byId("open-settings").addEventListener("click", () => on.settings());
    byId("stop").addEventListener("click", () => on.stop());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this._send();
    });
    this._box.addEventListener("input", () => this._fit());
    this._box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this._send();
    });
    this._fit();
  }

  focus() {
    if (!phone.matches) this._box.focus(); // a phone's keyboard would cover half of the page
  }

  busy(yes) {
    const inside = byId("composer").contains(document.activeElement);
    this._busy = yes;
    byId("stop").hidden = !yes;
    byId("send").hidden = yes;
    if (inside) this._box.focus();
    this._fit();
  }

  ready(yes) {
    this._ready = yes;
    this._fit();
  }

  settings(settings) {
    say(byId("settings-summary"), summary(settings));
  }

  _send() {
    const text = this._box.value;
    if (!text.trim() || this._busy || !this._ready) return;
    this._box.value = "";
    this._fit();
    this._on.send(text.replace(/\s+$/, ""));
  }

  _fit() {
    this._box.style.height = "auto";
    this._box.style.height = `${this._box.scrollHeight}px`;
    byId("send").disabled = !this._box.value.trim() || !this._ready;
  }
}
