// Conversations in the browser's storage, one entry each, so that two tabs do not overwrite each other's.

const PREFIX = "moe-ray.chat.";
const FORMAT = "moe-ray-conversations-1";
const ROLES = ["user", "assistant"];

export class StorageFull extends Error {}

export function newChat() {
  return { id: crypto.randomUUID?.() ?? randomId(), title: "", messages: [], updated: Date.now() };
}

export function newMessage(role, content, more = {}) {
  return { id: crypto.randomUUID?.() ?? randomId(), role, content, ...more };
}

// randomUUID exists only in secure contexts: not where the server is asked for by name, without TLS.
function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function titleOf(chat) {
  if (chat.title) return chat.title;
  const first = chat.messages.find((message) => message.role === "user")?.content.trim() ?? "";
  return first ? first.replace(/\s+/g, " ").slice(0, 60) : "New chat";
}

// All stored conversations, the latest first; entries that are damaged are left out.
export function allChats() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    if (!key.startsWith(PREFIX)) continue;
    try {
      found.push(checked(JSON.parse(localStorage.getItem(key))));
    } catch {
      // damaged, or of a later version
    }
  }
  return found.sort((a, b) => b.updated - a.updated);
}

// Throws StorageFull.
export function saveChat(chat) {
  if (!chat.messages.length) return;
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
  } catch {
    throw new StorageFull("The browser's storage is full: this conversation is not kept. Delete or export old ones.");
  }
}

export function deleteChat(chat) {
  localStorage.removeItem(PREFIX + chat.id);
}

export function exportChats() {
  return JSON.stringify({ format: FORMAT, conversations: allChats() }, null, 2);
}

// Add the conversations of an exported file; how many. Throws an Error that says what is wrong with the file.
export function importChats(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) throw new Error("This file was not exported by this page.");
  const chats = file.conversations.map(checked); // all, before one is stored
  for (const chat of chats) saveChat(chat);
  return chats.length;
}

export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed();
  });
}

// A conversation with nothing in it but what we know.
function checked(chat) {
  if (typeof chat?.id !== "string" || !/^[\w-]{1,64}$/.test(chat.id) || !Array.isArray(chat.messages)) {
    throw new Error("The file holds something that is no conversation.");
  }
  const all = chat.messages.map((message) => {
    if (!ROLES.includes(message?.role) || typeof message.content !== "string") {
      throw new Error("The file holds something that is no message.");
    }
    const kept = newMessage(message.role, message.content);
    if (typeof message.id === "string") kept.id = message.id;
    if (message.facts && typeof message.facts === "object") kept.facts = facts(message.facts);
    return kept;
  });
  const messages = all.filter((message) => message.content !== ""); // an answer that never began
  const updated = Number.isFinite(chat.updated) ? chat.updated : Date.now();
  return { id: chat.id, title: typeof chat.title === "string" ? chat.title.slice(0, 200) : "", messages, updated };
}

function facts(told) {
  const numbers = ["tokens", "firstMs", "perSecond", "degraded"].filter((name) => Number.isFinite(told[name]));
  const kept = Object.fromEntries(numbers.map((name) => [name, told[name]]));
  return typeof told.finish === "string" ? { ...kept, finish: told.finish.slice(0, 20) } : kept;
}
