// The card of the trunks.

import { el, say } from "./dom.js";
import { count, names, percent } from "./words.js";

export class TrunksCard {
  constructor() {
    this._list = el("div");
    this._title = el("h3", { textContent: "Trunk" });
    this._what = el("span", { class: "sub" });
    this.box = el("section", { class: "card", "aria-label": "Trunks" }, el("div", { class: "card-head" }, this._title, this._what), this._list);
    this._rows = new Map();
  }

  update(house) {
    say(this._title, house.trunks.length > 1 ? `${house.trunks.length} trunks` : "Trunk");
    const first = house.trunks.find((trunk) => trunk.device);
    say(this._what, first ? `${first.format} on ${first.device}` : "");
    const several = new Set(house.trunks.map((trunk) => trunk.model).filter(Boolean)).size > 1;
    const seen = new Set();
    for (const trunk of house.trunks) {
      seen.add(trunk.replica_id);
      if (!this._rows.has(trunk.replica_id)) this._add(trunk.replica_id);
      this._rows.get(trunk.replica_id)(trunk, several);
    }
    for (const [id, show] of this._rows) {
      if (seen.has(id)) continue;
      show.box.remove();
      this._rows.delete(id);
    }
    this._list.hidden = !house.trunks.length;
  }

  _add(id) {
    const word = el("span");
    const state = el("p", { class: "state" }, el("span", { class: "dot" }), word);
    const bar = el("i");
    const meter = el("div", { class: "meter", role: "meter", "aria-label": "KV cache in use", "aria-valuemin": "0", "aria-valuemax": "100" }, bar);
    const value = (label) => [el("dt", { textContent: label }), el("dd", { textContent: "–" })];
    const cells = ["Running", "Waiting", "KV cache", "Tokens out", "Context", "Process"].map(value);
    const pairs = el("dl", { class: "pairs" }, cells.map((pair) => el("div", {}, pair)));
    const box = el("div", { class: "trunk" }, state, pairs, meter);
    meter.style.marginTop = "11px";
    const show = (trunk, several) => {
      state.dataset.state = trunk.missing?.length ? "loading" : trunk.state;
      const says = trunk.missing?.length ? `waits for ${names(trunk.missing)}` : trunk.state;
      say(word, several && trunk.model ? `${trunk.model}: ${says}` : says);
      if (trunk.device === undefined) return;
      const told = [count(trunk.running), count(trunk.waiting), percent(trunk.kv_use), count(trunk.generated_tokens), count(trunk.max_model_len), `${trunk.pid}`];
      cells.forEach(([, cell], i) => say(cell, told[i]));
      bar.style.width = `${Math.max(100 * trunk.kv_use, 0.5)}%`;
      meter.setAttribute("aria-valuenow", String(Math.round(100 * trunk.kv_use)));
    };
    show.box = box;
    this._rows.set(id, show);
    this._list.append(box);
  }
}
