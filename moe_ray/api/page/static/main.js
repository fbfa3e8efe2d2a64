// The page: its parts, and how they are connected.

import { newChat, onOtherTab } from "./chats.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { byId, icon, say } from "./dom.js";
import { House } from "./house.js";
import { apiKey, getJson, health } from "./server.js";
import { loadSettings, saveSettings } from "./settings.js";
import { openKey, openSettings } from "./settings_dialog.js";
import { Sidebar } from "./sidebar.js";
import { startTheme } from "./theme.js";
import { names } from "./words.js";

const HOUSE_CLOSED = "moe-ray.house-closed";
const HEALTH_MS = { ready: 10_000, waiting: 1000, down: 3000 };
const narrow = matchMedia("(max-width: 1180px)");
const phone = matchMedia("(max-width: 760px)");

const state = { model: null, settings: loadSettings(), house: null };
const body = document.body;

const house = new House(
  {
    looked: (found) => {
      state.house = found;
      if (state.model) shownHealth(found.missing.length ? { ready: false, missing: found.missing } : { ready: true, missing: [] });
      if (found.experts.length) about(found);
    },
    absent: () => {
      body.dataset.house = "closed";
      byId("toggle-house").hidden = true;
      byId("tab-house").hidden = true;
    },
    locked,
    notice,
  },
  () => (phone.matches ? body.dataset.view === "house" : body.dataset.house !== "closed"),
);

const conversation = new Conversation(state, {
  busy: (yes) => {
    composer.busy(yes);
    if (!yes) house.heat.rest();
  },
  saved: () => sidebar.draw(),
  storage: (error) => notice(error.message),
  failed: (error) => {
    if (error.status === 401) locked(error);
    if (error.status === 503 || error.kind === "network") connect();
  },
  routed: (turn, fresh) => house.heat.routed(turn.routing, fresh),
  pick: (routing, token) => {
    house.heat.pick(routing, token);
    if (routing && token !== null && !phone.matches) openHouse(true);
  },
});

const composer = new Composer({
  send: (text) => {
    notice(null);
    conversation.send(text);
  },
  stop: () => conversation.stop(),
  settings: () =>
    openSettings(state.settings, (settings, keyChanged) => {
      state.settings = settings;
      saveSettings(settings);
      composer.settings(settings);
      if (keyChanged) connect();
    }),
});

const sidebar = new Sidebar({
  current: () => conversation.chat,
  open: (chat) => {
    conversation.open(chat);
    leaveList();
  },
  fresh: () => {
    conversation.open(newChat());
    leaveList();
  },
  notice,
});

function leaveList() {
  showChats(false);
  view("chat");
  sidebar.draw();
  composer.focus();
}

function about(found) {
  const text = byId("about");
  if (text) say(text, `Every token is computed by ${found.top_k} of ${found.num_experts} experts in each of ${found.layers} layers, and every expert is a process of its own. The house shows which ones, while they work.`);
}

function notice(text) {
  byId("notice").hidden = !text;
  say(byId("notice"), text ?? "");
}

// ---- the server

let healthTimer = 0;

async function connect() {
  clearTimeout(healthTimer);
  let shown = { ready: false, missing: null };
  try {
    shown = await health();
    const { data } = await getJson("v1/models");
    state.model = data[0].id;
    say(byId("model"), state.model);
    document.title = `${state.model} · moe_ray`;
    composer.ready(true);
  } catch (error) {
    if (error.status === 401) locked(error);
  }
  shownHealth(shown);
  house.look();
  healthTimer = setTimeout(() => (document.hidden ? null : connect()), HEALTH_MS[byId("health").dataset.state]);
}

// A request was refused. Where another key has been given since, the next request tells whether that one is right.
function locked(error) {
  if (error.key !== apiKey.get()) return;
  openKey(error.key ? "The key that was given is not one of the server's." : error.message, connect);
}

function shownHealth({ ready, missing }) {
  const [word, text] = ready ? ["ready", "ready"] : missing ? ["waiting", `waiting for ${names(missing)}`] : ["down", "not reachable"];
  byId("health").dataset.state = word;
  say(byId("health-text"), text);
}

document.addEventListener("visibilitychange", () => document.hidden || connect());
addEventListener("online", connect);

// ---- the views

function openHouse(yes) {
  body.dataset.house = yes ? "open" : "closed";
  localStorage.setItem(HOUSE_CLOSED, yes ? "" : "1");
  byId("toggle-house").setAttribute("aria-expanded", String(yes));
  if (yes) house.look();
}

function view(name) {
  body.dataset.view = name;
  byId("tab-chat").setAttribute("aria-pressed", String(name === "chat"));
  byId("tab-house").setAttribute("aria-pressed", String(name === "house"));
  if (name === "house") house.look();
}

function showChats(yes) {
  const open = yes && narrow.matches;
  body.dataset.chats = open ? "open" : "closed";
  byId("shade").hidden = !open;
  byId("open-chats").setAttribute("aria-expanded", String(open));
  if (open) byId("new-chat").focus();
}

byId("toggle-house").append(icon("grid"), "House");
byId("toggle-house").addEventListener("click", () => openHouse(body.dataset.house === "closed"));
byId("tab-chat").addEventListener("click", () => view("chat"));
byId("tab-house").addEventListener("click", () => view("house"));
byId("open-chats").append(icon("menu"));
byId("open-chats").addEventListener("click", () => showChats(true));
byId("shade").addEventListener("click", () => showChats(false));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (body.dataset.chats === "open") {
    showChats(false);
    byId("open-chats").focus();
  } else conversation.stop();
});
onOtherTab(() => sidebar.draw());
startTheme(byId("theme"), () => house.heat.redraw());
composer.settings(state.settings);
openHouse(!localStorage.getItem(HOUSE_CLOSED));
connect();
composer.focus();
