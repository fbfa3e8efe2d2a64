// The dialogs: settings of requests, and the API key.

import { el, icon } from "./dom.js";
import { apiKey } from "./server.js";
import { FIELDS, fault } from "./settings.js";

let numbered = 0;

function field(label, help, input, full = false) {
  const id = `field-${(numbered += 1)}`;
  const wrong = el("span", { class: "wrong", id: `${id}-wrong`, role: "alert" });
  input.id = id;
  input.setAttribute("aria-describedby", `${id}-help ${id}-wrong`);
  const box = el("div", { class: full ? "field full" : "field" }, el("label", { for: id, textContent: label }), input, el("span", { class: "help", id: `${id}-help`, textContent: help }), wrong);
  return { box, input, wrong };
}

function show(title, body, done, submit) {
  const dialog = el("dialog", { "aria-labelledby": "dialog-title" });
  const form = el("form", { method: "dialog", class: "dialog-form", novalidate: true });
  const close = el("button", { type: "button", class: "icon-button", "aria-label": "Close", onclick: () => dialog.close() }, icon("close"));
  form.append(
    el("div", { class: "dialog-head" }, el("h2", { id: "dialog-title", textContent: title }), close),
    el("div", { class: "dialog-body", tabindex: "-1" }, body),
    el("div", { class: "dialog-foot" }, el("button", { type: "button", class: "button", onclick: () => dialog.close() }, "Cancel"), el("button", { type: "submit", class: "button primary" }, submit)),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (done()) dialog.close();
  });
  dialog.addEventListener("close", () => dialog.remove());
  dialog.append(form);
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

// Ask for settings; `changed` is called with the new ones.
export function openSettings(settings, changed) {
  const system = field("System prompt", "Stands before every conversation.", el("textarea", { value: settings.system, rows: 3 }), true);
  const inputs = FIELDS.map((each) => {
    const props = { type: "number", min: each.min, max: each.max, step: "any", inputmode: "decimal", placeholder: "as the model says" };
    return [each, field(each.label, each.help, el("input", { ...props, value: settings.values[each.name] ?? "" }))];
  });
  const stop = field("Stop strings", "One a line. The answer ends before the first of them.", el("textarea", { value: settings.stop, rows: 2 }), true);
  const routing = el("input", { type: "checkbox", id: "routing", checked: settings.routing, "aria-describedby": "routing-help" });
  const check = el(
    "div",
    { class: "check" },
    routing,
    el("label", { for: "routing", textContent: "Record which experts each token uses" }),
    el("span", { class: "help", id: "routing-help", textContent: "Lets you pick tokens of an answer. Such requests compute the whole prompt, without its cached prefix." }),
  );
  const key = field("API key", "Kept until this tab is closed. Only needed where the server demands one.", keyInput(), true);

  function done() {
    const values = {};
    let first = null;
    for (const [each, { input, wrong }] of inputs) {
      const said = input.value.trim();
      const value = said === "" && !input.validity.badInput ? undefined : Number(said || Number.NaN);
      const why = fault(each, value);
      wrong.textContent = why ?? "";
      input.setAttribute("aria-invalid", String(why !== null));
      if (why !== null) first ??= input;
      else if (value !== undefined) values[each.name] = value;
    }
    first?.focus();
    if (first) return false;
    const newKey = key.input.value.trim();
    const keyChanged = newKey !== apiKey.get();
    apiKey.set(newKey);
    changed({ system: system.input.value, stop: stop.input.value, values, routing: routing.checked }, keyChanged);
    return true;
  }
  show("Settings", [system.box, el("div", { class: "fields" }, inputs.map(([, { box }]) => box)), stop.box, check, key.box], done, "Save");
}

// Ask for the API key that the server demands.
export function openKey(why, changed) {
  if (document.querySelector("dialog[open]")) return;
  const key = field("API key", "Kept until this tab is closed, and sent to this server only.", keyInput(), true);
  const done = () => {
    apiKey.set(key.input.value.trim());
    changed();
    return true;
  };
  show("This server asks for an API key", [el("p", { class: "help", textContent: why }), key.box], done, "Use this key");
  key.input.focus();
}

function keyInput() {
  return el("input", { type: "password", autocomplete: "off", spellcheck: "false", value: apiKey.get() });
}
