// The page of pid-serve: a file and settings go to the server, its events come back.

const $ = (id) => document.getElementById(id);
const made = []; // object URLs of the last result
let models = [];
let running = null; // an AbortController

function headers(more = {}) {
  const token = $("token").value;
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function loadModels() {
  const answer = await fetch("v1/models", { headers: headers() });
  $("token-row").hidden = answer.status !== 401 && !$("token").value;
  if (answer.status === 401) throw new Error("This server wants a token.");
  if (!answer.ok) throw new Error(await reason(answer));
  models = (await answer.json()).models;
  $("model").replaceChildren(...models.map((model) => new Option(model.name)));
  showModel();
}

function chosenModel() {
  return models.find((model) => model.name === $("model").value);
}

function showModel() {
  const model = chosenModel();
  if (!model) return;
  $("steps").replaceChildren(
    new Option("default", ""),
    ...model.steps.map((steps) => new Option(steps)),
  );
  $("prompt-row").hidden = !model.prompts;
}

// What a refusal says, in one line.
async function reason(answer) {
  try {
    return detailText((await answer.json()).detail);
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

function detailText(detail) {
  if (typeof detail === "string") return detail;
  return detail.map((each) => `${each.loc.join(".")}: ${each.msg}`).join("; ");
}

function settings() {
  const given = {
    model: $("model").value,
    sigma: $("sigma").value,
    seed: $("seed").value,
    steps: $("steps").value,
    output: $("output").value,
    tile: $("tile").value,
    prompt: $("prompt-row").hidden ? "" : $("prompt").value.trim(),
    preview: "true",
    native: "true",
  };
  return Object.entries(given).filter(([, value]) => value !== "");
}

function request(file) {
  const isLatent = file.name.endsWith(".safetensors");
  if (!isLatent) {
    const form = new FormData();
    settings().forEach(([name, value]) => form.append(name, value));
    form.append("image", file);
    return ["v1/upscale", form, {}];
  }
  // A latent of sigma 0 may say in its file what it is.
  const query = new URLSearchParams(settings().filter(([name, value]) => name !== "sigma" || value !== "0"));
  return [`v1/decode?${query}`, file, { "Content-Type": "application/octet-stream" }];
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const found = block.match(/^event: (\w+)\ndata: (.*)$/);
      if (found) yield [found[1], JSON.parse(found[2])];
    }
  }
}

function objectUrl({ media_type, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: media_type }));
  made.push(url);
  return url;
}

async function run(file) {
  const [path, body, more] = request(file);
  const begin = performance.now();
  const answer = await fetch(path, {
    method: "POST",
    body,
    headers: headers({ Accept: "text/event-stream", ...more }),
    signal: running.signal,
  });
  if (!answer.ok) throw new Error(await reason(answer));
  let native = null;
  for await (const [name, data] of events(answer.body)) {
    if (name === "error") throw new Error(detailText(data.detail));
    if (name === "step") showStep(data);
    if (name === "native") native = objectUrl(data);
    if (name === "image") return showResult(file, objectUrl(data), native, performance.now() - begin);
  }
  throw new Error("The server ended before the picture was made.");
}

function showStep({ step, steps, preview }) {
  $("progress").max = steps;
  $("progress").value = step;
  $("status").textContent = `Step ${step} of ${steps}`;
  if (preview) {
    $("preview").src = preview;
    $("preview").hidden = false;
  }
}

async function showResult(file, image, native, milliseconds) {
  $("pid").src = image;
  await $("pid").decode();
  // Of a picture without a native decode the picture itself is compared.
  const isPicture = !file.name.endsWith(".safetensors");
  if (!native && isPicture) made.push((native = URL.createObjectURL(file)));
  $("native").hidden = $("line").hidden = $("slider-row").hidden = !native;
  if (native) $("native").src = native;
  const size = `${$("pid").naturalWidth} x ${$("pid").naturalHeight}`;
  $("about").textContent = `${size}, ${(milliseconds / 1000).toFixed(1)} s`;
  $("download").href = image;
  $("download").download = `${file.name.replace(/\.\w+$/, "")}-pid.${$("output").value}`;
  $("preview").hidden = true;
  $("result").hidden = false;
  $("status").textContent = "Done";
}

function slide(percent) {
  $("slider").value = percent;
  $("compare").style.setProperty("--cut", `${$("slider").value}%`);
}

function slideTo(event) {
  if (!(event.buttons & 1)) return;
  const box = $("compare").getBoundingClientRect();
  slide((100 * (event.clientX - box.left)) / box.width);
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = $("file").files;
  made.splice(0).forEach((url) => URL.revokeObjectURL(url));
  $("result").hidden = $("preview").hidden = true;
  $("error").textContent = "";
  $("status").textContent = "Waiting";
  $("progress").removeAttribute("value");
  $("start").disabled = true;
  $("cancel").disabled = false;
  running = new AbortController();
  try {
    if (!models.length) await loadModels();
    await run(file);
  } catch (error) {
    const isCancelled = error.name === "AbortError";
    $("status").textContent = isCancelled ? "Cancelled" : "";
    if (!isCancelled) $("error").textContent = error.message;
    $("preview").hidden = true;
  }
  running = null;
  $("progress").value = 0;
  $("start").disabled = false;
  $("cancel").disabled = true;
});
$("cancel").addEventListener("click", () => running?.abort());
$("model").addEventListener("change", showModel);
$("sigma").addEventListener("input", () => ($("sigma-shown").value = $("sigma").value));
$("slider").addEventListener("input", () => slide($("slider").value));
$("compare").addEventListener("pointerdown", slideTo);
$("compare").addEventListener("pointermove", slideTo);
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) {
      $("file").files = event.dataTransfer.files;
    }
  });
}
const tryModels = () => loadModels().then(
  () => ($("error").textContent = ""),
  (error) => ($("error").textContent = error.message),
);
$("token").addEventListener("change", tryModels);
tryModels();
