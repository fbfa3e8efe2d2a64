// What stands inside a line of Markdown: code, emphasis, links, line breaks. Text stays text.

import { el } from "./dom.js";

const MARKS = [
  [/^(`+)([\s\S]*?[^`])\1(?!`)/, (found) => el("code", { textContent: found[2].replace(/^ (.+) $/s, "$1") })],
  [/^\\([!-/:-@[-`{-~])/, (found) => found[1]],
  [/^!?\[([^\]]*)\]\(\s*<?([^\s)>]+)>?(?:\s+["'][^)]*["'])?\s*\)/, (found) => link(found[2], found[1] || found[2])],
  [/^<((?:https?:\/\/|mailto:)[^\s<>]+)>/, (found) => link(found[1], found[1])],
  [/^https?:\/\/[^\s<>]*[^\s<>.,:;"')\]!?]/, (found) => link(found[0], found[0])],
  [/^\*\*(?=\S)([\s\S]*?\S)\*\*/, (found) => el("strong", {}, inline(found[1]))],
  [/^__(?=\S)([\s\S]*?\S)__(?!\w)/, (found) => el("strong", {}, inline(found[1])), true],
  [/^\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/, (found) => el("em", {}, inline(found[1]))],
  [/^_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)/, (found) => el("em", {}, inline(found[1])), true],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (found) => el("s", {}, inline(found[1]))],
  [/^(?: {2,}|\\)\n/, () => el("br")],
];
const STARTS = /[`\\![<*_~h ]/g;
const LONGEST = 4000; // a mark that ends later is text: no line may take a search over all that follows, at each star

// The nodes (and strings) of one line or paragraph.
export function inline(text) {
  const nodes = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    STARTS.lastIndex = at;
    const next = STARTS.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at === text.length) break;
    const mark = markAt(text, at);
    if (mark === null) {
      plain += text[at];
      at += 1;
      continue;
    }
    at += mark.length;
    if (typeof mark.node === "string") {
      plain += mark.node;
      continue;
    }
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(mark.node);
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function markAt(text, at) {
  const rest = text.slice(at, at + LONGEST);
  const insideWord = at > 0 && /\w/.test(text[at - 1]);
  for (const [pattern, make, notInWords] of MARKS) {
    if (notInWords && insideWord) continue;
    const found = pattern.exec(rest);
    if (found) return { node: make(found), length: found[0].length };
  }
  return null;
}

// A link where the address is one that a browser may safely open; else its text.
function link(address, text) {
  let target = null;
  try {
    target = new URL(address);
  } catch {
    // relative, or no address at all
  }
  if (!target || !["http:", "https:", "mailto:"].includes(target.protocol)) return text;
  return el("a", { href: target.href, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}
