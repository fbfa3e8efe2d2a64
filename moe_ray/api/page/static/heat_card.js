// The card with the heat map: of all traffic, or of one answer; and below it the token that was picked.

import { el, say } from "./dom.js";
import { Heat } from "./heat.js";
import { shown } from "./tokens.js";
import { count } from "./words.js";

export class HeatCard {
  constructor() {
    this._canvas = el("canvas", { class: "heat", role: "img" });
    this._under = el("p");
    this._heat = new Heat(this._canvas, (text) => say(this._under, text || this._caption));
    this._caption = "";
    this._modes = [["traffic", "Traffic"], ["answer", "Answer"]].map(([mode, label]) =>
      el("button", { type: "button", "aria-pressed": String(mode === "traffic"), dataset: { mode }, onclick: () => this.choose(mode) }, label),
    );
    this._token = el("section", { class: "card", hidden: true, "aria-label": "The picked token" });
    const head = el("div", { class: "card-head" }, el("h3", { textContent: "Layers × experts" }), el("div", { class: "modes", role: "group", "aria-label": "What the map shows" }, this._modes));
    const legend = el("span", { class: "legend", "aria-hidden": "true" }, "few", el("i"), "many");
    this._box = el("section", { class: "card", "aria-label": "Heat map", hidden: true }, head, this._canvas, el("div", { class: "heat-foot" }, this._under, legend));
    this.parts = [this._box, this._token];
    this._mode = "traffic";
    this._house = null;
    this._routing = null;
  }

  // `house`: the answer of GET /house.
  update(house) {
    this._house = house;
    this._box.hidden = !house.layers;
    this._heat.shape(house.layers, house.num_experts);
    if (!house.experts.some((expert) => expert.replicas.length) && this._mode === "traffic") this.choose("answer"); // in the trunk
    this._show();
  }

  choose(mode) {
    this._mode = mode;
    for (const button of this._modes) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    this._show();
  }

  // An answer grew by `fresh` tokens whose experts are known now.
  routed(routing, fresh) {
    this._routing = routing;
    for (let token = routing.known - fresh; token < routing.known; token++) this._heat.flash(routing.of(token));
    if (this._mode === "answer") this._show();
  }

  rest() {
    this._heat.rest();
  }

  redraw() {
    this._heat.draw();
  }

  // Show one token of an answer; null: none.
  pick(routing, token) {
    if (routing) this._routing = routing;
    const chosen = token === null ? null : routing.of(token);
    this._heat.mark(chosen);
    this._token.hidden = token === null;
    if (token !== null) this._showToken(routing, token, chosen);
    if (token !== null) this.choose("answer");
    else this._show();
  }

  _show() {
    if (!this._house) return;
    const { layers, num_experts: experts, window_s: window } = this._house;
    if (this._mode === "answer") {
      const known = this._routing?.known ?? 0;
      const values = known ? this._routing.counts(experts) : new Float64Array(layers * experts);
      this._say(known ? `${count(known)} tokens of this answer` : "No answer yet: ask something");
      this._heat.show(values, "tokens");
      return;
    }
    const values = new Float64Array(layers * experts);
    for (const { expert, rows_per_layer: rows } of this._house.experts) rows.forEach((value, layer) => (values[layer * experts + expert] = value));
    this._say(`Rows of the last ${Math.round(window)} s`);
    this._heat.show(values, "rows");
  }

  _say(caption) {
    if (this._under.textContent === this._caption || !this._under.textContent) say(this._under, caption);
    this._caption = caption;
    this._canvas.setAttribute("aria-label", `Heat map of ${this._house.layers} layers by ${this._house.num_experts} experts. ${caption}. ${this._busiest()}`);
  }

  _busiest() {
    const list = this._house.experts.filter((expert) => expert.rows_per_s > 0).sort((a, b) => b.rows_per_s - a.rows_per_s);
    return list.length ? `The busiest is expert ${list[0].expert}.` : "";
  }

  _showToken(routing, token, chosen) {
    const name = el("span", { class: "token-name", textContent: shown(routing.tokens[token].text) });
    const where = `token ${count(token + 1)} of the answer, position ${count(routing.promptTokens + token)}`;
    const head = el("div", { class: "card-head" }, el("h3", { textContent: "Experts of this token" }), name);
    const rows = chosen?.map((experts, layer) =>
      el(
        "li",
        { "aria-label": `Layer ${layer}: experts ${experts.join(" and ")}` },
        el("span", { class: "layer", "aria-hidden": "true", textContent: layer }),
        experts.map((expert) => el("span", { class: "chosen", "aria-hidden": "true", textContent: expert })),
      ),
    );
    const body = rows ? el("ul", { class: "strip" }, rows) : el("p", { class: "sub", textContent: "Nothing was computed for it: it is the last one, and none followed." });
    this._token.replaceChildren(head, el("p", { class: "sub", textContent: where }), body);
  }
}
