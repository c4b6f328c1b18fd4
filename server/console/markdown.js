// Turns Markdown, as models write it, into DOM nodes. A model's text becomes text nodes and checked
// attributes, never HTML: it cannot run, load or style anything.

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const BLOCK = /^( {0,3}(#{1,6} |```|~~~|>|[-*+] |\d{1,9}[.)] )|\s*$)/;

/** A DocumentFragment for the text. */
export function markdown(text) {
  const fragment = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), fragment, 0);
  return fragment;
}

function element(name, parent, className) {
  const node = document.createElement(name);
  if (className) node.className = className;
  parent.append(node);
  return node;
}

function blocks(lines, parent, depth) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at += 1;
    } else if ((match = line.match(/^\s*(```+|~~~+)\s*([^\s`]*)/))) {
      at = fence(lines, at, match, parent);
    } else if ((match = line.match(/^ {0,3}(#{1,6}) +(.*?)\s*#*$/))) {
      inline(match[2], element(`h${Math.min(6, match[1].length + 2)}`, parent));
      at += 1;
    } else if (/^ {0,3}([-*_])( *\1){2,}\s*$/.test(line)) {
      element("hr", parent);
      at += 1;
    } else if (/^ {0,3}>/.test(line) && depth < 8) {
      const end = run(lines, at, (each) => /^ {0,3}>/.test(each));
      const inner = lines.slice(at, end).map((each) => each.replace(/^ {0,3}> ?/, ""));
      blocks(inner, element("blockquote", parent), depth + 1);
      at = end;
    } else if ((match = line.match(/^( *)([-*+]|\d{1,9}[.)]) /)) && depth < 8) {
      at = list(lines, at, match, parent, depth);
    } else if (line.includes("|") && /^\s*\|?(\s*:?-+:?\s*\|)+\s*(:?-+:?)?\s*$/.test(lines[at + 1] ?? "")) {
      at = table(lines, at, parent);
    } else {
      const end = run(lines, at + 1, (each) => !BLOCK.test(each));
      inline(lines.slice(at, end).join("\n"), element("p", parent));
      at = end;
    }
  }
}

function run(lines, from, belongs) {
  let end = from;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

function fence(lines, at, [opening, ticks, language], parent) {
  const indent = opening.match(/^\s*/)[0].length;
  const closes = (line) => line.trim().startsWith(ticks) && !line.trim().slice(ticks.length).trim();
  const end = run(lines, at + 1, (line) => !closes(line));
  const code = lines.slice(at + 1, end).map((line) => {
    const spaces = line.match(/^ */)[0].length;
    return line.slice(Math.min(indent, spaces));
  });
  const figure = element("figure", parent, "code");
  element("figcaption", figure).textContent = language.slice(0, 40);
  const copy = element("button", figure, "quiet");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.dataset.copy = code.join("\n");
  element("code", element("pre", figure)).textContent = code.join("\n");
  return end + 1;
}

function list(lines, at, [, indent, mark], parent, depth) {
  const ordered = /\d/.test(mark);
  const node = element(ordered ? "ol" : "ul", parent);
  if (ordered) node.start = parseInt(mark, 10);
  const item = ordered ? /^( *)\d{1,9}[.)] +(.*)$/ : /^( *)[-*+] +(.*)$/;
  while (at < lines.length) {
    const match = lines[at].match(item);
    if (!match || match[1].length !== indent.length) break;
    const inner = [match[2]];
    const continues = (line) => !line.trim() || line.match(/^ */)[0].length > indent.length;
    let end = run(lines, at + 1, continues);
    while (end > at + 1 && !lines[end - 1].trim()) end -= 1;
    const rest = lines.slice(at + 1, end);
    const widths = rest.filter((line) => line.trim()).map((line) => line.match(/^ */)[0].length);
    const shift = Math.min(...widths);
    inner.push(...rest.map((line) => line.slice(shift)));
    const li = element("li", node);
    if (inner.length === 1) inline(inner[0], li);
    else blocks(inner, li, depth + 1);
    at = run(lines, end, (line) => !line.trim());
  }
  return at;
}

function table(lines, at, parent) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const node = element("table", parent);
  const heads = element("tr", element("thead", node));
  for (const cell of cells(lines[at])) inline(cell.trim(), element("th", heads));
  const body = element("tbody", node);
  const end = run(lines, at + 2, (line) => line.includes("|"));
  for (const line of lines.slice(at + 2, end)) {
    const row = element("tr", body);
    for (const cell of cells(line)) inline(cell.trim(), element("td", row));
  }
  return end;
}

const INLINE =
  /(?<code>`+)(?<quoted>[^`]|[^`][\s\S]*?[^`])\k<code>(?!`)|\[(?<label>[^\]\n]*)\]\((?<href>[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)|(?<url>https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"*_`])|(?<strong>\*\*|__)(?=\S)(?<bold>[^\n]*?\S)\k<strong>|(?<![\w*])(?<em>[*_])(?=[^\s*_])(?<slanted>[^\n]*?[^\s*_])\k<em>(?![\w*])|~~(?=\S)(?<struck>[^\n]*?\S)~~/;

function inline(text, parent, depth = 0) {
  while (text) {
    const match = depth < 8 ? text.match(INLINE) : null;
    if (!match) {
      parent.append(text);
      return;
    }
    const { quoted, label, href, url, bold, slanted, struck } = match.groups;
    if (match.index) parent.append(text.slice(0, match.index));
    if (quoted !== undefined) element("code", parent).textContent = quoted.trim() || quoted;
    else if (url !== undefined) link(url, parent).textContent = url;
    else if (href !== undefined && SAFE_LINK.test(href)) inline(label, link(href, parent), depth + 1);
    else if (href !== undefined) parent.append(match[0]);
    else if (bold !== undefined) inline(bold, element("strong", parent), depth + 1);
    else if (slanted !== undefined) inline(slanted, element("em", parent), depth + 1);
    else inline(struck, element("s", parent), depth + 1);
    text = text.slice(match.index + match[0].length);
  }
}

function link(href, parent) {
  const anchor = element("a", parent);
  anchor.href = href;
  anchor.rel = "noopener noreferrer nofollow";
  anchor.target = "_blank";
  return anchor;
}
