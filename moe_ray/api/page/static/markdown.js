// Markdown into elements: blocks here, what is inside of lines in inline.js. It understands what models write.

import { copyText, el, icon } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)/;
const ROW = /^\s*\|.*\|\s*$/;
const DIVIDER = /^\s*\|?(?:\s*:?-+:?\s*\|)+\s*:?-*:?\s*\|?\s*$/;
const DEEPEST = 12; // lists in quotes in lists …

// Show `text` in `box`. Blocks that are as before keep their elements: only the end of a growing answer is made anew.
export function render(box, text) {
  const before = box.blocks ?? [];
  const after = blocks(text);
  let same = 0;
  while (same < before.length && same < after.length && before[same] === after[same]) same += 1;
  while (box.childNodes.length > same) box.lastChild.remove();
  for (const block of after.slice(same)) box.append(element(block, 0));
  box.blocks = after;
}

// The top-level blocks of a text, as the source of each.
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const end = endOfBlock(lines, at);
    found.push(lines.slice(at, end).join("\n").replace(/\n\s*$/, ""));
    at = end;
  }
  return found;
}

function endOfBlock(lines, start) {
  const first = lines[start];
  let at = start + 1;
  const fence = FENCE.exec(first);
  if (fence) {
    while (at < lines.length && !closes(lines[at], fence[1])) at += 1;
    return Math.min(at + 1, lines.length);
  }
  if (HEADING.test(first) || RULE.test(first)) return at;
  if (QUOTE.test(first)) {
    while (at < lines.length && lines[at].trim() && (QUOTE.test(lines[at]) || !begins(lines[at]))) at += 1;
    return at;
  }
  if (ITEM.test(first)) return endOfList(lines, start);
  if (isTable(lines, start)) {
    while (at < lines.length && lines[at].includes("|") && lines[at].trim()) at += 1;
    return at;
  }
  while (at < lines.length && lines[at].trim() && !begins(lines[at]) && !isTable(lines, at)) at += 1;
  return at;
}

function endOfList(lines, start) {
  const ordered = isOrdered(lines[start]);
  let at = start + 1;
  let fence = null;
  for (; at < lines.length; at++) {
    const line = lines[at];
    const inner = FENCE.exec(line.trimStart());
    if (fence) {
      if (closes(line.trimStart(), fence)) fence = null;
      continue;
    }
    if (inner && /^\s/.test(line)) {
      fence = inner[1];
      continue;
    }
    if (line.trim() === "") {
      const next = lines.slice(at).find((each) => each.trim());
      if (next === undefined || !(/^ {2,}/.test(next) || (ITEM.test(next) && isOrdered(next) === ordered))) break;
      continue;
    }
    if (/^ {2,}/.test(line)) continue;
    if (ITEM.test(line) ? RULE.test(line) || isOrdered(line) !== ordered : begins(line)) break;
  }
  return at;
}

const isOrdered = (line) => /\d/.test(ITEM.exec(line)[2]);
const begins = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
const isTable = (lines, at) => ROW.test(lines[at]) && at + 1 < lines.length && DIVIDER.test(lines[at + 1]);

function closes(line, fence) {
  const found = /^ {0,3}(`{3,}|~{3,})\s*$/.exec(line);
  return found !== null && found[1][0] === fence[0] && found[1].length >= fence.length;
}

function element(block, depth) {
  const lines = block.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence);
  const heading = HEADING.exec(lines[0]);
  if (heading) return el(`h${Math.min(heading[1].length + 1, 5)}`, {}, inline(heading[2])); // the page has the h1
  if (RULE.test(lines[0])) return el("hr");
  if (depth < DEEPEST && QUOTE.test(lines[0])) {
    return el("blockquote", {}, all(lines.map((line) => line.replace(QUOTE, "")), depth));
  }
  if (depth < DEEPEST && ITEM.test(lines[0])) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return el("p", {}, inline(block.replace(/^ +/gm, "")));
}

const all = (lines, depth) => blocks(lines.join("\n")).map((block) => element(block, depth + 1));

function list(lines, depth) {
  const ordered = isOrdered(lines[0]);
  const start = Number.parseInt(ITEM.exec(lines[0])[2], 10);
  const indent = ITEM.exec(lines[0])[1].length; // further in: a list inside of an item
  const items = [];
  let fenced = null;
  for (const line of lines) {
    const found = fenced ? null : ITEM.exec(line);
    if (found && found[1].length <= indent + 1) items.push([line.slice(found[0].length)]);
    else items.at(-1).push(line.replace(/^ {1,4}/, ""));
    const inner = FENCE.exec(line.trimStart());
    if (fenced ? closes(line.trimStart(), fenced) : inner) fenced = fenced ? null : inner[1];
  }
  const made = items.map((item) => {
    const children = all(item, depth);
    if (children[0]?.tagName === "P") children.splice(0, 1, ...children[0].childNodes);
    return el("li", {}, children);
  });
  return el(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {}, made);
}

function cells(line) {
  const marked = line.trim().replace(/^\||\|$/g, "").replace(/\\\|/g, "\u0000");
  return marked.split("|").map((cell) => cell.replaceAll("\u0000", "|").trim());
}

function table(lines) {
  const row = (line, tag) => el("tr", {}, cells(line).map((cell) => el(tag, {}, inline(cell))));
  const made = el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, lines.slice(2).map((line) => row(line, "td"))));
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, made);
}

function code(lines, fence) {
  const closed = lines.length > 1 && closes(lines.at(-1), fence[1]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const language = fence[2].trim().split(/\s/)[0].slice(0, 24);
  const copy = el("button", { type: "button", class: "quiet", "aria-label": "Copy code" }, icon("copy"));
  copy.addEventListener("click", () => copyText(text, copy));
  return el(
    "div",
    { class: "code" },
    el("div", { class: "code-head" }, el("span", { textContent: language || "code" }), copy),
    el("pre", { tabindex: "0", role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, el("code", { textContent: text })),
  );
}
