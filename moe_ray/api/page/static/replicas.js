// The replicas of one expert: where each runs, what it holds, how busy it is.

import { el, say } from "./dom.js";
import { bytes, count, percent } from "./words.js";

export class ReplicaList {
  constructor(kill) {
    this._kill = kill;
    this.box = el("ul", { class: "replicas" });
    this._rows = new Map();
  }

  update(expert, control) {
    const seen = new Set(expert.replicas.map((replica) => replica.replica_id));
    for (const [id, row] of this._rows) {
      if (seen.has(id)) continue;
      row.item.remove();
      this._rows.delete(id);
    }
    for (const replica of expert.replicas) {
      if (!this._rows.has(replica.replica_id)) this._add(expert.expert, replica.replica_id);
      this._rows.get(replica.replica_id).show(replica, control);
    }
  }

  _add(expert, id) {
    const word = el("span");
    const state = el("p", { class: "state" }, el("span", { class: "dot" }), word);
    const what = el("p", { class: "what" });
    let now = null;
    const kill = el("button", { type: "button", class: "kill", onclick: () => this._kill(expert, now) }, "Kill");
    const item = el("li", { class: "replica" }, state, kill, what);
    const show = (replica, control) => {
      now = replica;
      state.dataset.state = replica.state;
      const loading = replica.state === "loading" ? ` ${percent(replica.loaded)}` : "";
      say(word, replica.pid ? `${replica.state}${loading} · process ${replica.pid} on ${replica.node}` : replica.state);
      const told = replica.pid
        ? `${replica.format} on ${replica.device}, ${bytes(replica.weight_bytes)} · busy ${percent(replica.busy)} · waits ${replica.queue_ms.toFixed(1)} ms · ${count(replica.queued_rows)} queued`
        : "does not answer yet";
      say(what, told);
      kill.hidden = !control;
      kill.disabled = !["running", "loading"].includes(replica.state);
      kill.setAttribute("aria-label", `Kill process ${replica.pid ?? ""} of expert ${expert}`);
    };
    this._rows.set(id, { item, show });
    this.box.append(item);
  }
}
