// One message of the conversation. What the model says becomes text nodes only, never markup.
import { make, t } from "./words.js";

const FENCE = /^ {0,3}```.*$/;

// [{code, text}]: text outside and inside of ``` fences; an open fence lasts to the end.
export function segments(text) {
  const found = [{ code: false, lines: [] }];
  for (const line of text.split("\n")) {
    const last = found.at(-1);
    if (FENCE.test(line)) found.push({ code: !last.code, lines: [] });
    else last.lines.push(line);
  }
  return found.map(({ code, lines }) => ({ code, text: lines.join("\n").replace(/^\n+|\n+$/g, "") }))
    .filter(({ code, text: inside }) => code || inside);
}

// Shows `text` in `element`; only the parts that changed are touched, so that a selection above them survives.
function fill(element, text) {
  const parts = segments(text);
  parts.forEach((part, place) => {
    let child = element.children[place];
    if (!child || (child.tagName === "PRE") !== part.code) {
      const fresh = part.code ? make("pre") : make("p");
      if (part.code) {
        fresh.tabIndex = 0;
        fresh.append(make("code"));
      }
      if (child) child.replaceWith(fresh);
      else element.append(fresh);
      child = fresh;
    }
    const target = part.code ? child.firstChild : child;
    if (target.textContent !== part.text) target.textContent = part.text;
  });
  while (element.children.length > parts.length) element.lastChild.remove();
}

export class Message {
  constructor(role) {
    this.reasoning = this.content = "";
    this.element = make("article", `message ${role}`);
    const name = make("h3", "", "");
    name.dataset.text = role === "user" ? "you" : "model";
    name.textContent = t(name.dataset.text);
    this.thought = make("details", "reasoning");
    this.thought.hidden = true;
    const summary = make("summary", "", t("reasoning"));
    summary.dataset.text = "reasoning";
    this.thoughtText = make("div");
    this.thought.append(summary, this.thoughtText);
    this.body = make("div", "text");
    this.element.append(name, this.thought, this.body);
    this.drawing = 0;
  }

  // Add a piece; drawn with the browser's next frame, however many pieces come.
  add(reasoning, content) {
    this.reasoning += reasoning;
    this.content += content;
    if (reasoning && !content && this.thought.hidden) this.thought.open = true;
    if (content && this.content === content) this.thought.open = false; // the answer begins
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.draw());
  }

  draw() {
    if (this.drawing) cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    this.thought.hidden = !this.reasoning;
    fill(this.thoughtText, this.reasoning);
    fill(this.body, this.content);
    this.onDraw?.();
  }

  // A word about how it ended. `key`: of words.js; or, without one, the server's own words.
  note(key, text, className) {
    const note = make("p", className, key ? t(key) : text);
    if (key) note.dataset.text = key;
    this.element.append(note);
    return note;
  }
}
