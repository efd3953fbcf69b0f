// One message of the conversation.
import { show } from "./markdown.js";
import { copyButton } from "./snippets.js";
import { make, t } from "./words.js";

export class Message {
  constructor(role) {
    this.reasoning = this.content = "";
    this.plain = role === "user"; // the user's text is shown as typed
    this.element = make("article", `message ${role}`);
    const name = make("h3", "", "");
    name.dataset.text = this.plain ? "you" : "model";
    name.textContent = t(name.dataset.text);
    this.thought = make("details", "reasoning");
    this.thought.hidden = true;
    const summary = make("summary", "", t("reasoning"));
    summary.dataset.text = "reasoning";
    this.thoughtText = make("div");
    this.thought.append(summary, this.thoughtText);
    this.body = make("div", "text");
    this.copy = copyButton(() => this.content);
    this.copy.hidden = true;
    const head = make("div", "bar"), buttons = make("div", "row");
    buttons.append(this.copy);
    head.append(name, buttons);
    this.element.append(head, this.thought, this.body);
    this.drawing = 0;
  }

  // Adds a button that calls `edit`.
  addEdit(edit) {
    const button = make("button", "quiet", t("edit"));
    button.type = "button";
    button.dataset.text = "edit";
    button.addEventListener("click", edit);
    this.copy.before(button);
  }

  // Adds a piece; drawn with the browser's next frame, whatever the number of pieces.
  add(reasoning, content) {
    this.reasoning += reasoning;
    this.content += content;
    if (reasoning && !content && this.thought.hidden) this.thought.open = true;
    if (content && this.content === content) this.thought.open = false; // the answer starts
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.draw());
  }

  draw() {
    if (this.drawing) cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    this.thought.hidden = !this.reasoning;
    show(this.thoughtText, this.reasoning);
    if (this.plain) this.body.textContent = this.content;
    else show(this.body, this.content);
    this.element.classList.toggle("waiting", !this.plain && !this.reasoning && !this.content);
    this.onDraw?.();
  }

  // Ends the message.
  end() {
    this.draw();
    this.element.classList.remove("waiting");
    this.copy.hidden = !this.content;
  }

  // Adds a note about its end. `key`: of words.js; or, without one, the server's text.
  note(key, text, className) {
    const note = make("p", className, key ? t(key) : text);
    if (key) note.dataset.text = key;
    this.element.append(note);
    return note;
  }
}
