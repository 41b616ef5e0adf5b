"use strict";
// One question at a time; the next one is fetched while this one is read. All text is set as text, never as HTML.

const $ = (id) => document.getElementById(id);
const KEYS = {
  ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right",
  c: "correct", s: "skip", u: "undo", t: "type", h: "held-out",
};
const page = {
  question: null, // shown
  next: null,     // a promise of the one after it
  typed: null,    // the typed conversation; null: held-out prompts
  skipped: [],    // ids of questions skipped on this page
  editing: null,  // "correction", "turn" or null
  busy: false,
  text: false,    // whether the run's prompts are plain text
};

const mode = () => Number(document.querySelector("input[name=mode]:checked").value);
const rater = () => ($("raters").hidden ? $("rater") : $("raters")).value.trim();

function make(tag, text, className) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

function say(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

async function ask(path, body, tries = 10) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; restart it and open its new address");
  }
  if (response.status === 503 && tries > 1) {
    if (page.busy) say("Waiting for other requests…");
    await new Promise((wake) => setTimeout(wake, 1000 * Number(response.headers.get("Retry-After"))));
    return ask(path, body, tries - 1);
  }
  if (response.status === 403) throw new Error("the server was restarted; open its new address");
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  showState(answer);
  return answer.question;
}

// A complete action: one at a time, and failures are shown.
async function act(doing, failed) {
  if (page.busy) return;
  page.busy = true;
  $("card").setAttribute("aria-busy", "true");
  try {
    await doing();
  } catch (error) {
    say(`${failed}: ${error.message}`, "failed");
  } finally {
    page.busy = false;
    $("card").setAttribute("aria-busy", "false");
  }
}

function fetchNext() {
  const besides = page.question ? [page.question.id] : [];
  const next = ask("/api/next", { rater: rater(), completions: mode(), besides, skipped: page.skipped });
  next.catch(() => {}); // shown when it is needed
  page.next = next;
}

async function showNext() {
  let question = page.next && await page.next.catch(() => null);
  if (!question) {
    fetchNext();
    question = await page.next;
  }
  show(question);
  fetchNext();
}

function show(question) {
  page.question = question;
  page.editing = null;
  const turns = question ? question.prompt : page.typed;
  showPrompt(turns);
  $("completions").replaceChildren(...(question ? question.completions : []).map((text, index, all) => {
    const answer = make("article", "", "answer");
    answer.append(make("h4", all.length === 1 ? "Completion" : ["First", "Second"][index]), make("p", text, "text"));
    return answer;
  }));
  arrange();
}

function showPrompt(turns) {
  const messages = typeof turns === "string" ? [{ role: "text", content: turns }] : turns || [];
  $("prompt").replaceChildren(...messages.map(({ role, content }) => {
    const turn = make("p", "", role);
    turn.append(make("b", role), content);
    return turn;
  }));
  $("prompt").classList.remove("scrolled");
  showNewest();
}

function showNewest() {
  $("prompt").scrollTop = $("prompt").scrollHeight;
}

// Show and enable what applies now.
function arrange() {
  const shown = page.question ? page.question.completions.length : 0;
  $("actions").hidden = page.editing !== null;
  for (const button of document.querySelectorAll("#actions button")) {
    const of = button.dataset.mode;
    button.hidden = Boolean(of) && Number(of) !== (shown || mode());
    button.disabled = !shown && button.dataset.act !== "undo";
  }
  $("editor").hidden = page.editing === null;
  $("blank").hidden = page.editing !== "turn" || (page.typed || []).length > 0;
  $("held-out").hidden = page.typed === null && page.question !== null;
  $("editor-label").textContent = page.editing === "turn" ? "You say" : "What it should have said";
  $("send").firstChild.textContent = page.editing === "turn" ? "Send " : "Save correction ";
}

function edit(what, text) {
  page.editing = what;
  $("text").value = text;
  arrange();
  $("text").focus();
}

// After a rating: the next held-out prompt, or the next turn of the typed conversation.
async function goOn(saidText) {
  if (page.typed === null) return showNext();
  page.typed = page.text ? [] : [...page.question.prompt, { role: "assistant", content: saidText }];
  show(null);
  edit("turn", "");
}

async function save(opinion, text) {
  await act(async () => {
    say("Saving…");
    await ask("/api/rate", { rater: rater(), question: page.question.id, ...opinion });
    say("Saved", "saved");
    await goOn(text).catch((error) => {
      show(null);
      say(`Saved, but the next completion failed: ${error.message}`, "failed");
    });
  }, "Not saved");
}

async function sendTurn(text) {
  await act(async () => {
    const typed = page.text ? text : [...page.typed, { role: "user", content: text }];
    say("Generating completions…");
    const question = await ask("/api/next", { rater: rater(), completions: mode(), typed });
    say("");
    show(question);
  }, "No completion");
}

const ACTIONS = {
  up: () => save({ label: true }, page.question.completions[0]),
  down: () => save({ label: false }, page.question.completions[0]),
  left: () => save({ better: 0 }, page.question.completions[0]),
  right: () => save({ better: 1 }, page.question.completions[1]),
  correct: () => edit("correction", page.question.completions[0]),
  skip: () => act(async () => {
    if (page.typed !== null) return goOn(page.question.completions[0]);
    page.skipped.push(page.question.id);
    await showNext();
    say("Skipped");
  }, "No completion"),
  undo: () => act(async () => {
    const question = await ask("/api/undo", { rater: rater() });
    page.typed = question.typed ? [] : null;
    page.next = null;
    const other = document.querySelector(`input[name=mode][value="${question.completions.length}"]`);
    other.checked = true;
    show(question);
    fetchNext();
    say("Undone: rate it again, or skip it", "saved");
  }, "Not undone"),
  type: () => { page.typed = []; show(null); edit("turn", ""); },
  "held-out": () => act(async () => { page.typed = null; page.question = null; page.next = null; await showNext(); }, "No completion"),
};

function press(name) {
  const button = document.querySelector(`[data-act="${name}"]`);
  if (page.busy || button.disabled || button.hidden || button.closest("[hidden]")) return;
  ACTIONS[name]();
}

function showState(state) {
  const { summary } = state;
  page.text = state.text;
  $("title").textContent = state.title;
  $("file").textContent = state.file;
  if (state.raters.length && $("raters").hidden) {
    $("raters").replaceChildren(...state.raters.map((name) => make("option", name)));
    $("raters").hidden = false;
    $("rater").hidden = true;
    $("raters").value = localStorage.getItem("rater") || state.raters[0];
    if (!$("raters").value) $("raters").value = state.raters[0];
  } else if (!$("rater").value && document.activeElement !== $("rater")) {
    $("rater").value = localStorage.getItem("rater") || state.default_rater;
  }
  const mine = summary.raters[rater()] || 0;
  const all = Object.values(summary.raters).reduce((sum, count) => sum + count, 0);
  const people = Object.keys(summary.raters).length;
  const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)}\u00a0%` : "–");
  const total = (what) => summary.roles.reduce((sum, one) => sum + one[what], 0);
  const tiles = [["By you", mine, "answered"]];
  if (people > 1) tiles.push(["By all", all, `${people} raters`]);
  tiles.push(["Good", share(total("up"), total("rated")), `of ${total("rated")} with a thumb`]);
  for (const [name, agreement] of [["Agreement, thumbs", summary.thumbs], ["Agreement, pairs", summary.pairs]]) {
    if (!agreement.questions) continue;
    const alpha = agreement.alpha === undefined || agreement.alpha === null ? "–" : agreement.alpha.toFixed(2);
    tiles.push([name, `α ${alpha}`, `Krippendorff, ${agreement.questions} rated by several raters`]);
  }
  $("tiles").replaceChildren(...tiles.map(([term, value, note]) => {
    const tile = make("div", "", "tile");
    tile.append(make("dt", term), make("dd", value, "value"), make("dd", note, "note"));
    return tile;
  }));
  $("roles").replaceChildren(...summary.roles.map((one) => {
    const row = document.createElement("tr");
    const cells = [one.rated, share(one.up, one.rated), one.compared, share(one.won, one.compared)];
    const head = make("th", one.role);
    head.scope = "row";
    row.append(head, ...cells.map((cell) => make("td", cell, "number")));
    return row;
  }));
}

addEventListener("resize", showNewest);
$("prompt").addEventListener("scroll", () => $("prompt").classList.toggle("scrolled", $("prompt").scrollTop > 0));
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button) press(button.dataset.act);
});
document.addEventListener("keydown", (event) => {
  if (page.editing && event.key === "Escape") return $("cancel").click();
  if (page.editing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) return $("editor").requestSubmit();
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest("input, select, textarea")) return;
  const name = KEYS[event.key] || KEYS[event.key.toLowerCase()];
  if (!name) return;
  event.preventDefault();
  press(name);
});
$("editor").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return say("Nothing is typed yet", "failed");
  if (page.editing === "turn") sendTurn(text);
  else save({ correction: text }, text);
});
$("cancel").addEventListener("click", () => {
  page.editing = null;
  if (!page.question) ACTIONS["held-out"]();
  else arrange();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("change", () => {
  localStorage.setItem("rater", rater());
  document.activeElement.blur();
  if (page.typed === null) ACTIONS["held-out"]();
  else arrange();
});

history.replaceState(null, "", "/"); // the cookie has the token now
act(async () => {
  await ask("/api/state");
  await showNext();
}, "No completion");
