"use strict";
const get = (id) => document.getElementById(id);

async function ask(path, options) {
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// Chosen at first, if the model knows one: the reader's own language, or a common one.
const COMMON = ["de", "fr", "es", "pt", "ru", "zh_Hans", "zh_CN", "zh", "ja", "ar"];

function firstChoice(languages) {
  const own = navigator.languages.flatMap((tag) => {
    const known = tag.replaceAll("-", "_");
    return [known, known.split("_")[0]];
  });
  // Into English is what the page is for.
  const foreign = [...own, ...COMMON].filter((tag) => !/^en(_|$)/.test(tag));
  return foreign.find((tag) => languages.includes(tag));
}

async function listLanguages() {
  const names = new Intl.DisplayNames(["en"], { type: "language" });
  const { languages } = await ask("languages");
  const options = languages.map((tag) => {
    const option = document.createElement("option");
    option.value = tag;
    let name = tag;
    try {
      name = names.of(tag.replaceAll("_", "-"));
    } catch {
      // Not a tag that browsers know a name for: it is shown as it is.
    }
    option.textContent = name === tag ? tag : `${name} (${tag})`;
    return option;
  });
  options.sort((a, b) => a.textContent.localeCompare(b.textContent, "en"));
  get("language").append(...options);
  const chosen = firstChoice(languages);
  if (chosen) get("language").value = chosen;
}

function show(found) {
  get("best").textContent = found.text || "(nothing)";
  const notes = [];
  if (found.truncated) notes.push("The text was too long: only its beginning was read.");
  if (found.unfinished) notes.push("The translation was too long: its end is missing.");
  get("notes").textContent = notes.join(" ");
  get("n-best").replaceChildren(
    ...found.n_best.map(({ text, score }) => {
      const row = document.createElement("tr");
      for (const value of [score.toFixed(3), text]) {
        const cell = document.createElement("td");
        cell.textContent = value;
        row.append(cell);
      }
      return row;
    })
  );
  get("result").hidden = false;
}

async function translate(event) {
  event.preventDefault();
  get("message").textContent = "";
  get("button").disabled = true;
  try {
    const { translations } = await ask("translate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        texts: [get("text").value],
        languages: [get("language").value],
      }),
    });
    show(translations[0]);
  } catch (error) {
    get("result").hidden = true;
    get("message").textContent = `That did not work: ${error.message}`;
  }
  get("button").disabled = false;
}

get("form").addEventListener("submit", translate);
listLanguages().catch((error) => {
  get("message").textContent = `The languages could not be listed: ${error.message}`;
});
