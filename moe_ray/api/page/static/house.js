// The house beside the chat: looked at every second while it can be seen, and changed where the operator lets the page.

import { byId, el, say } from "./dom.js";
import { ExpertsCard } from "./experts.js";
import { HappeningsCard } from "./happenings.js";
import { HeatCard } from "./heat_card.js";
import { change, getJson } from "./server.js";
import { TrunksCard } from "./trunks.js";
import { plural } from "./words.js";

const EVERY_MS = 1000;
const AFTER_FAULT_MS = 4000;

export class House {
  // `on`: {looked(house), absent(), locked(error), notice(text)}; `seen()`: whether the panel can be seen.
  constructor(on, seen) {
    this._on = on;
    this._seen = seen;
    this.heat = new HeatCard();
    this._trunks = new TrunksCard();
    this._experts = new ExpertsCard({ scale: (expert, replicas) => this._scale(expert, replicas), kill: (expert, replica) => this._kill(`Expert${expert}`, replica) });
    this._events = new HappeningsCard();
    this._sub = el("p");
    this._demo = this._demoCard();
    const head = el("div", { class: "house-head" }, el("h2", { textContent: "The house" }), this._sub);
    byId("house-inner").append(head, ...this.heat.parts, this._demo, this._events.box, this._trunks.box, this._experts.box);
    this._house = null;
    this._timer = 0;
    this._asking = false;
    this._stopped = false;
    document.addEventListener("visibilitychange", () => this.look());
  }

  // Look now, and every second from then on while the panel can be seen.
  async look() {
    clearTimeout(this._timer);
    if (this._stopped || this._asking || document.hidden || !this._seen()) return;
    this._asking = true;
    let wait = EVERY_MS;
    try {
      this._update(await getJson("house"));
    } catch (error) {
      wait = AFTER_FAULT_MS;
      if (error.status === 404) {
        this._stopped = true;
        this._on.absent();
      } else if (error.status === 401) this._on.locked(error);
      else say(this._sub, "does not answer");
    }
    this._asking = false;
    this._timer = setTimeout(() => this.look(), wait);
  }

  get state() {
    return this._house;
  }

  _update(house) {
    this._house = house;
    const replicas = new Set(house.experts.flatMap((expert) => expert.replicas.map((each) => each.replica_id))).size;
    const parts = [plural(house.trunks.length, "trunk"), plural(house.num_experts, "expert")];
    if (house.experts.length) parts.push(plural(replicas, "replica"));
    say(this._sub, parts.join(" · "));
    this.heat.update(house);
    this._trunks.update(house);
    this._experts.update(house);
    this._events.update(house);
    this._demo.hidden = !house.control || !house.experts.length;
    this._on.looked(house);
  }

  _demoCard() {
    const kill = el("button", { type: "button", class: "button danger", onclick: () => this._killBusiest() }, "Kill the busiest expert");
    const text = "While an answer comes, kill an expert: the answer pauses, Ray starts a new process, and it goes on with the very words it would have had.";
    return el("section", { class: "card", "aria-label": "Try it", hidden: true }, el("div", { class: "demo" }, el("h3", { textContent: "Break it" }), el("p", { textContent: text }), kill));
  }

  _killBusiest() {
    const alive = (expert) => expert.replicas.find((replica) => replica.state === "running");
    const [expert] = this._house.experts.filter(alive).sort((a, b) => b.rows_per_s - a.rows_per_s);
    if (expert) this._kill(`Expert${expert.expert}`, alive(expert));
  }

  async _kill(name, replica) {
    await this._change("house/kill", { replica_id: replica.replica_id }, () => this._events.killed(name, replica));
  }

  async _scale(expert, replicas) {
    await this._change("house/scale", { expert, replicas }, () => this._events.add("warn", `Expert${expert}: ${plural(replicas, "replica")} asked for`));
  }

  async _change(path, body, done) {
    try {
      await change(path, body);
      done();
    } catch (error) {
      this._on.notice(error.message);
    }
    this.look();
  }
}
