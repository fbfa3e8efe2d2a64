// The list of conversations: open, rename, delete, export, import.

import { allChats, deleteChat, exportChats, importChats, saveChat, titleOf } from "./chats.js";
import { byId, el, icon, iconButton } from "./dom.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  // `on`: {open(chat), fresh(), current() → chat, notice(text)}
  constructor(on) {
    this._on = on;
    byId("new-chat").append(icon("plus"), "New chat");
    byId("new-chat").addEventListener("click", () => on.fresh());
    byId("export").addEventListener("click", () => this._export());
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this._import(event.target));
    this.draw();
  }

  draw() {
    let when = null;
    const items = [];
    for (const chat of allChats()) {
      const group = age(chat.updated);
      if (group !== when) items.push(el("li", { class: "when", textContent: (when = group) }));
      items.push(this._item(chat));
    }
    byId("chat-list").replaceChildren(...items);
  }

  _item(chat) {
    const current = chat.id === this._on.current().id;
    const title = titleOf(chat);
    const item = el("li", { class: "chat-item", dataset: { current } });
    const open = el("button", { type: "button", class: "open", title, "aria-current": current ? "true" : null, onclick: () => this._on.open(chat) }, title);
    item.append(
      open,
      iconButton("pencil", `Rename ${title}`, () => this._rename(item, chat)),
      iconButton("bin", `Delete ${title}`, () => this._delete(chat)),
    );
    return item;
  }

  _rename(item, chat) {
    const input = el("input", { value: titleOf(chat), "aria-label": "Name of the conversation", maxlength: "200" });
    let left = false;
    const leave = (keep) => {
      if (left) return;
      left = true;
      if (keep && input.value.trim()) {
        chat.title = input.value.trim();
        if (chat.id === this._on.current().id) this._on.current().title = chat.title;
        saveChat(chat);
      }
      this.draw();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") leave(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        leave(false);
      }
    });
    input.addEventListener("blur", () => leave(true));
    item.replaceChildren(input);
    input.select();
  }

  _delete(chat) {
    if (!confirm(`Delete “${titleOf(chat)}”?`)) return;
    deleteChat(chat);
    if (chat.id === this._on.current().id) this._on.fresh();
    this.draw();
    byId("new-chat").focus();
  }

  _export() {
    const file = URL.createObjectURL(new Blob([exportChats()], { type: "application/json" }));
    el("a", { href: file, download: "moe-ray-conversations.json" }).click();
    setTimeout(() => URL.revokeObjectURL(file), 10_000);
  }

  async _import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      importChats(await file.text());
    } catch (error) {
      this._on.notice(error.message);
    }
    this.draw();
  }
}

function age(then) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (then >= today) return "Today";
  if (then >= today - DAY_MS) return "Yesterday";
  return then >= today - 7 * DAY_MS ? "Last week" : "Earlier";
}
