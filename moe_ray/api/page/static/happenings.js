// What happened in the house, found by comparing two looks at it.

import { el } from "./dom.js";
import { names } from "./words.js";

const MOST = 8;

// [{kind: "good" | "warn" | "bad", text}] between an earlier and a later answer of GET /house. Of the replicas `known`
// it is said already that they go.
export function differences(before, after, known = new Set()) {
  const found = [];
  const old = replicas(before);
  const now = replicas(after);
  for (const [id, { name, state, pid }] of old) {
    if (now.has(id) || known.has(id)) continue;
    const told = pid ? ` (process ${pid})` : "";
    found.push(state === "stopping" ? { kind: "warn", text: `${name}: a replica is gone${told}` } : { kind: "bad", text: `${name}: a replica died${told}` });
  }
  for (const [id, { name, state, pid }] of now) {
    const was = old.get(id);
    const told = pid ? ` (process ${pid})` : "";
    if (!was) found.push({ kind: state === "running" ? "good" : "warn", text: `${name}: a replica ${state === "running" ? "serves" : "starts"}${told}` });
    else if (was.state !== state && state === "running") found.push({ kind: "good", text: `${name}: the new replica serves${told}` });
    else if (was.state !== state && state === "away" && !known.has(id)) found.push({ kind: "bad", text: `${name}: a replica does not answer` });
    else if (was.state !== state && state === "stopping") found.push({ kind: "warn", text: `${name}: a replica is let go${told}` });
  }
  if (after.missing.join() !== before.missing.join()) {
    found.push(after.missing.length ? { kind: "bad", text: `Missing: ${names(after.missing)}` } : { kind: "good", text: "Everything is up" });
  }
  return found;
}

function replicas(house) {
  const found = new Map(house.trunks.map((trunk) => [trunk.replica_id, { ...trunk, name: "Trunk" }]));
  for (const expert of house.experts) {
    for (const replica of expert.replicas) {
      if (!found.has(replica.replica_id)) found.set(replica.replica_id, { ...replica, name: expert.deployment ?? replica.deployment });
    }
  }
  return found;
}

export class HappeningsCard {
  constructor() {
    this._list = el("ol", { class: "events" });
    this.box = el("section", { class: "card", "aria-label": "What happened", hidden: true }, el("div", { class: "card-head" }, el("h3", { textContent: "What happened" })), this._list);
    this._before = null;
    this._killed = new Set();
  }

  killed(name, replica) {
    this._killed.add(replica.replica_id);
    this.add("bad", `${name}: process ${replica.pid} killed by you`);
  }

  update(house) {
    if (this._before) for (const { kind, text } of differences(this._before, house, this._killed)) this.add(kind, text);
    this._before = house;
  }

  add(kind, text) {
    const time = new Date().toLocaleTimeString("en-GB");
    this._list.prepend(el("li", { dataset: { kind } }, el("span", { class: "dot" }), el("time", { textContent: time }), el("span", { textContent: text })));
    while (this._list.childElementCount > MOST) this._list.lastChild.remove();
    this.box.hidden = false;
  }
}
