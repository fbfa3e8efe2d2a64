// The card of the experts: a row each, with its load, its replicas and, where the page may, what changes them.

import { el, icon, say } from "./dom.js";
import { ReplicaList } from "./replicas.js";
import { count, percent } from "./words.js";

export class ExpertsCard {
  // `on`: {scale(expert, replicas), kill(replica)}
  constructor(on) {
    this._on = on;
    this._sub = el("span", { class: "sub" });
    this._list = el("ul", { class: "experts" });
    this.box = el("section", { class: "card", "aria-label": "Experts" }, el("div", { class: "card-head" }, el("h3", { textContent: "Experts" }), this._sub), this._list);
    this._rows = new Map();
  }

  update(house) {
    const inTrunk = house.experts.length === 0;
    this._list.hidden = inTrunk;
    const skew = house.max_over_mean === null ? "" : `busiest ${house.max_over_mean.toFixed(2)} × mean`;
    say(this._sub, inTrunk ? `${count(house.num_experts)} in the trunk's process` : skew);
    const most = Math.max(1e-9, ...house.experts.map((expert) => expert.rows_per_s));
    for (const expert of house.experts) {
      if (!this._rows.has(expert.expert)) this._add(expert.expert);
      this._rows.get(expert.expert).update(expert, most, house.control);
    }
  }

  _add(number) {
    const row = new ExpertRow(number, this._on);
    this._rows.set(number, row);
    this._list.append(row.item);
  }
}

class ExpertRow {
  constructor(number, on) {
    this._number = number;
    this._bar = el("i");
    this._dots = el("span", { class: "dots" });
    this._rate = el("span", { class: "expert-rate" });
    this._replicas = new ReplicaList(on.kill);
    this._replicas.box.id = `replicas-${number}`;
    this._replicas.box.hidden = true;
    this._open = el(
      "button",
      { type: "button", class: "expert-open", "aria-expanded": "false", "aria-controls": this._replicas.box.id, onclick: () => this._toggle() },
      el("span", { class: "expert-name" }, `Expert ${number}`),
      el("span", { class: "meter", "aria-hidden": "true" }, this._bar),
      this._rate,
    );
    const step = (name, label, by) =>
      el("button", { type: "button", class: "step", "aria-label": `${label} of expert ${number}`, title: label, onclick: () => on.scale(number, this._wanted + by) }, icon(name));
    this._less = step("minus", "One replica less", -1);
    this._more = step("plus", "One replica more", 1);
    this._many = el("b");
    this._count = el("div", { class: "count", role: "group", "aria-label": `Replicas of expert ${number}` }, this._dots, this._less, this._many, this._more);
    this.item = el("li", { class: "expert" }, el("div", { class: "expert-row" }, this._open, this._count), this._replicas.box);
    this._wanted = 1;
  }

  update(expert, most, control) {
    this._wanted = expert.wanted ?? Math.max(expert.replicas.length, 1);
    this._bar.style.width = `${(100 * expert.rows_per_s) / most}%`;
    say(this._rate, `${count(expert.rows_per_s)} rows/s`);
    this._open.title = `Expert ${this._number}: computing ${percent(expert.busy)} of the time`;
    const states = expert.replicas.map((replica) => replica.state);
    if (states.join() !== this._states) {
      this._states = states.join();
      this._dots.replaceChildren(...states.map((state) => el("span", { class: "dot", dataset: { state } })));
      this._dots.append(el("span", { class: "sr", textContent: states.length ? states.join(", ") : "no replica" }));
    }
    say(this._many, String(this._wanted));
    const here = control && expert.deployment !== null;
    for (const part of [this._less, this._more, this._many]) part.hidden = !here;
    this._less.disabled = this._wanted <= 1;
    this._replicas.update(expert, control);
  }

  _toggle() {
    const box = this._replicas.box;
    box.hidden = !box.hidden;
    this._open.setAttribute("aria-expanded", String(!box.hidden));
  }
}
