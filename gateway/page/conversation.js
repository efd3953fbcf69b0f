// The conversation: its turns, kept in this tab across a reload, and the options of its requests.
import { Message } from "./message.js";
import { byId, keep, kept } from "./words.js";

const TURNS = "shoehorn.turns", OPTIONS = "shoehorn.options";
const FIELDS = ["system", "temperature", "length"];

export const turns = []; // {question, answer: Message, answered}: only answered ones are context of the next question

const plain = ({ question, answer }) => ({
  question: question.content, reasoning: answer.reasoning, content: answer.content,
});

export function save() {
  keep("sessionStorage", TURNS, turns.length ? JSON.stringify(turns.map(plain)) : "");
}

// Adds a turn to the log. `edit` is called by the question's button.
export function add(text, edit) {
  const question = new Message("user"), answer = new Message("assistant");
  const turn = { question, answer, answered: false };
  question.content = text;
  question.addEdit(() => edit(turn));
  question.end();
  answer.draw();
  turns.push(turn);
  byId("log").append(question.element, answer.element);
  return turn;
}

// Removes a turn and all that follow.
export function removeFrom(turn) {
  for (const { question, answer } of turns.splice(turns.indexOf(turn))) {
    question.element.remove();
    answer.element.remove();
  }
  save();
}

// Shows the turns that a reload left behind.
export function restore(edit) {
  let saved = [];
  try {
    saved = JSON.parse(kept("sessionStorage", TURNS) || "[]");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  for (const { question, reasoning, content } of saved) {
    const turn = add(question, edit);
    turn.answered = Boolean(content);
    turn.answer.reasoning = reasoning;
    turn.answer.content = content;
    turn.answer.end();
  }
}

// The body of the request for the last turn, apart from the model.
export function request() {
  const messages = [];
  const system = byId("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const turn of turns) {
    if (!turn.answered && turn !== turns.at(-1)) continue;
    messages.push({ role: "user", content: turn.question.content });
    if (turn !== turns.at(-1)) messages.push({ role: "assistant", content: turn.answer.content });
  }
  const body = { messages };
  if (byId("temperature").value) body.temperature = Number(byId("temperature").value);
  if (byId("length").value) body.max_tokens = Number(byId("length").value);
  return body;
}

export function setUpOptions() {
  let saved = {};
  try {
    saved = JSON.parse(kept("sessionStorage", OPTIONS) || "{}");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  for (const id of FIELDS) {
    byId(id).value = saved[id] ?? "";
    byId(id).addEventListener("change", () => {
      const values = Object.fromEntries(FIELDS.map((each) => [each, byId(each).value]).filter(([, value]) => value));
      keep("sessionStorage", OPTIONS, Object.keys(values).length ? JSON.stringify(values) : "");
    });
  }
  byId("options").open = FIELDS.some((id) => byId(id).value);
}
