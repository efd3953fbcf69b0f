// Renders Markdown of a model: marked's lexer returns tokens, which become elements and text nodes here, never markup.
// Links are shown as text with their address.
import { Marked } from "./marked.esm.js";
import { copyButton } from "./snippets.js";
import { make } from "./words.js";

const MATH = /^(\$\$[\s\S]+?\$\$|\\\([\s\S]+?\\\)|\\\[[\s\S]+?\\\])/;
const BOLD = /^\*\*(?=[^\s*])([\s\S]*?[^\s*])\*\*(?!\*)/;

const reader = new Marked({ gfm: true }).use({
  extensions: [
    { // formulas stay unchanged
      name: "math", level: "inline", start: (text) => text.search(/\$\$|\\[([]/),
      tokenizer(text) {
        const found = MATH.exec(text);
        return found ? { type: "math", raw: found[0], text: found[0] } : undefined;
      },
    },
    { // the standard requires a space after ** and punctuation, which Chinese text does not have
      name: "bold", level: "inline", start: (text) => text.indexOf("**"),
      tokenizer(text) {
        const found = BOLD.exec(text);
        return found ? { type: "strong", raw: found[0], tokens: this.lexer.inlineTokens(found[1]) } : undefined;
      },
    },
  ],
});

function append(element, tokens = []) {
  for (const token of tokens) element.append(inline(token));
  return element;
}

function inline(token) {
  switch (token.type) {
    case "strong": case "em": case "del": return append(make(token.type), token.tokens);
    case "codespan": return make("code", "", token.text);
    case "br": return make("br");
    case "link": {
      const shown = append(make("span"), token.tokens);
      if (shown.textContent !== token.href) shown.append(` (${token.href})`);
      return shown;
    }
    case "escape": case "text": if (!token.tokens) return document.createTextNode(token.text); // falls through
    default: return token.tokens ? append(make("span"), token.tokens) : document.createTextNode(token.raw);
  }
}

function code(token) {
  const box = make("div", "code"), bar = make("div", "bar"), block = make("pre");
  bar.append(make("span", "", token.lang ?? ""), copyButton(() => token.text));
  block.tabIndex = 0;
  block.append(make("code", "", token.text));
  box.append(bar, block);
  return box;
}

function list(token) {
  const made = make(token.ordered ? "ol" : "ul");
  if (token.ordered) made.start = Number(token.start) || 1;
  for (const item of token.items) {
    const entry = make("li");
    if (item.task) entry.append(item.checked ? "☑ " : "☐ ");
    for (const part of item.tokens) entry.append(part.type === "text" ? append(make("span"), part.tokens) : block(part));
    made.append(entry);
  }
  return made;
}

function table(token) {
  const box = make("div", "wide"), made = make("table"), body = make("tbody");
  box.tabIndex = 0;
  const row = (cells, tag) => {
    const line = make("tr");
    for (const cell of cells) line.append(append(make(tag), cell.tokens));
    return line;
  };
  const head = make("thead");
  head.append(row(token.header, "th"));
  body.append(...token.rows.map((cells) => row(cells, "td")));
  made.append(head, body);
  box.append(made);
  return box;
}

function block(token) {
  switch (token.type) {
    case "code": return code(token);
    case "heading": return append(make("h4"), token.tokens);
    case "hr": return make("hr");
    case "list": return list(token);
    case "table": return table(token);
    case "blockquote": {
      const quote = make("blockquote");
      quote.append(...token.tokens.filter(seen).map(block));
      return quote;
    }
    default: return token.tokens ? append(make("p"), token.tokens) : make("p", "", token.raw.trim());
  }
}

const seen = (token) => token.type !== "space" && token.type !== "def";

// Shows `text` in `element`; only changed blocks are replaced, so that a selection above them is kept.
export function show(element, text) {
  const blocks = reader.lexer(text).filter(seen);
  blocks.forEach((token, place) => {
    const child = element.children[place];
    if (child?.source === token.raw) return;
    const fresh = block(token);
    fresh.source = token.raw;
    if (child) child.replaceWith(fresh);
    else element.append(fresh);
  });
  while (element.children.length > blocks.length) element.lastChild.remove();
}
