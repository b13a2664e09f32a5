"""How the chat page looks: its HTML, its style and the little script that runs in the browser.

Everything that a person wrote is escaped here. Nothing refers to another host. This module knows turns; it does not
know gradio, jobs or the service.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Final

from poet_serving.api.page_talk import Sample, Talk, Turn

__all__ = ["ATTACH", "ATTACH_SCRIPT", "CSS", "HEADER_SCRIPT", "SCRIPT", "header_view", "login_page", "view"]

MAX_DOTS: Final = 9

Part = dict[str, Any]
"""{"key", "class", and "html" or "parts"}: what the script in the browser keeps in step, key by key, so that a clip
that plays is left alone while the next one is being written."""


def view(talk: Talk, examples: Sequence[str], edits: Sequence[str]) -> list[Part]:
    """A conversation as the page shows it.

    Args:
        talk: as it stands.
        examples: prompts to click on where nothing was said yet.
        edits: what may be said about the last clip, likewise.
    """
    if not talk.turns:
        return [{"key": "welcome", "class": "welcome", "html": _welcome(examples)}]
    shown = [part for number, turn in enumerate(talk.turns) for part in _turn(number, turn)]
    if edits and not talk.is_open:
        shown.append({"key": "edits", "class": "chips edits", "html": _chips(edits)})
    return shown


def _welcome(examples: Sequence[str]) -> str:
    chips = f"<p class='hint'>Try one:</p><div class='chips'>{_chips(examples)}</div>" if examples else ""
    return (
        "<h2>What should happen?</h2><p>Describe a short clip and what is heard in it. Then say what to change: "
        f"each answer takes up the one before.</p>{chips}"
    )


def _chips(texts: Sequence[str]) -> str:
    return "".join(f"<button type='button' data-say=\"{_text(text)}\">{_text(text)}</button>" for text in texts)


def _turn(number: int, turn: Turn) -> list[Part]:
    said = f"<p>{_text(turn.said)}</p>" if turn.said else ""
    if turn.file is not None:
        source = None if turn.answered is None else f"page/clips/{turn.answered.id}/given"
        picture = "" if source is None else f"<img src='{source}' alt=''>"
        said = f"<p class='file'>{picture}<span>{_ICONS['file']}{_text(turn.file)}</span></p>{said}"
    parts: list[Part] = []
    if turn.error is not None:
        parts.append({"key": "error", "class": "error", "html": f"<p role='alert'>{_text(turn.error)}</p>"})
    elif turn.prompt and turn.prompt != turn.said:
        parts.append({"key": "prompt", "class": "prompt", "html": f"<p>{_text(turn.prompt)}</p>"})
    for place, sample in enumerate(turn.samples):
        parts.append({"key": f"sample{place}", "class": f"sample {sample.status}", "html": _sample(sample)})
    count = f"count{min(4, len(turn.samples))}"
    return [
        {"key": f"said{number}", "class": "said", "html": said},
        {"key": f"answer{number}", "class": f"answer {count}", "parts": parts},
    ]


def _sample(sample: Sample) -> str:
    if sample.status == "queued":
        return f"<div class='tile'>{_queue(sample.place or 1)}</div>"
    if sample.status == "in_progress":
        label = f"Writing, {sample.percent} %" if sample.percent else "Writing …"
        return (
            f"<div class='tile'><div class='bar'><i style='width:{max(3, sample.percent)}%'></i></div>"
            f"<p role='status'>{label}</p></div>"
        )
    if sample.status == "failed":
        return f"<p class='error' role='alert'>{_text(sample.error or 'It could not be written.')}</p>"
    if sample.status == "gone":
        return "<p class='gone'>Stopped, or no longer kept.</p>"
    if sample.text is not None:
        return f"<p class='text'>{_text(sample.text)}</p>"
    return _clip(sample)


def _queue(place: int) -> str:
    """Those before it, as dots, and itself."""
    before = place - 1
    dots = "<i></i>" * min(before, MAX_DOTS)
    more = f"<em>+{before - MAX_DOTS}</em>" if before > MAX_DOTS else ""
    label = "Waiting, next in line" if before == 0 else f"Waiting, {_ordinal(place)} in line"
    return f"<div class='queue' aria-hidden='true'><b></b>{dots}{more}</div><p>{label}</p>"


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def _clip(sample: Sample) -> str:
    source = f"page/clips/{sample.id}/video"
    size = _text(sample.size or "").replace("x", " × ")
    facts = [f"{sample.seconds or 0:.1f} s" + (f" · {size}" if size else "")]
    facts += [f"seed {_text(sample.seed)}"] if sample.seed else []
    facts = [f"<span>{fact}</span>" for fact in facts]
    player = (
        f"<video src='{source}' controls playsinline preload='auto'></video>"
        if sample.size
        else f"<audio src='{source}' controls preload='auto'></audio>"
    )
    name = f"{sample.id}.{'mp4' if sample.size else 'wav'}"
    return (
        f"<figure>{player}<figcaption>{''.join(facts)}"
        f"<a href='{source}' download='{name}'>{_ICONS['download']}Download</a></figcaption></figure>"
    )


def _text(value: str) -> str:
    return html.escape(value).replace("\n", "<br>")


_LINE: Final = "fill='none' stroke='currentColor' stroke-width='2' stroke-linecap='round' stroke-linejoin='round'"
_ICONS: Final = {
    "file": f"<svg viewBox='0 0 24 24' {_LINE} aria-hidden='true'><path d='M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4"
    "a3.3 3.3 0 0 1 4.7 4.7l-8.5 8.4a1.6 1.6 0 0 1-2.3-2.3L14.5 7'/></svg>",
    "download": f"<svg viewBox='0 0 24 24' {_LINE} aria-hidden='true'><path d='M12 4v11m-5-4 5 5 5-5M5 20h14'/></svg>",
}


def header_view(name: str, size: str, seconds: float, owner: str) -> str:
    """The line above the conversation.

    Args:
        name: of the model.
        size: WIDTHxHEIGHT of its clips.
        seconds: that they last.
        owner: who is logged in; "" where nobody has to.
    """
    leave = f"<a href='logout'>Log out {_text(owner)}</a>" if owner else ""
    facts = f"{_text(name)} · {_text(size.replace('x', ' × '))} · {seconds:.1f} s"
    return (
        f"<h1>Poet</h1><span class='facts'>{facts}</span><nav>{leave}"
        "<button type='button' data-new>New conversation</button></nav>"
    )


def login_page(message: str | None) -> str:
    """The page that asks for a name and a key.

    Args:
        message: what was wrong with the last ones, as a sentence.
    """
    wrong = "" if message is None else f"<p class='error' role='alert'>{_text(message)}</p>"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Poet</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_LOGIN_CSS}</style></head><body><form method='post' action='login'><h1>Poet</h1>"
        f"<p>This server asks for a name and its key.</p>{wrong}"
        "<label>Name<input name='username' autocomplete='username' required autofocus maxlength='64'></label>"
        "<label>Key<input name='password' type='password' autocomplete='current-password' required maxlength='512'>"
        "</label><button>Log in</button></form></body></html>"
    )


_LOGIN_CSS: Final = """
:root { color-scheme: light dark; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: Canvas; color: CanvasText;
  font: 16px/1.5 system-ui, sans-serif; }
form { width: min(320px, 86vw); display: grid; gap: 14px; }
h1 { margin: 0; font: 600 30px/1.2 Georgia, serif; }
p { margin: 0; opacity: .8; }
.error { color: #c2361f; opacity: 1; }
label { display: grid; gap: 4px; font-size: 14px; }
input, button { font: inherit; padding: 10px 12px; border-radius: 10px; border: 1px solid #8886; }
button { background: #4353c9; color: #fff; border: 0; cursor: pointer; }
"""

ATTACH: Final = (
    f"<button type='button' class='attach' aria-label='Attach a picture, a clip or a sound' title='Attach a picture, a "
    f"clip or a sound'>{_ICONS['file']}</button><input type='file' accept='image/*,video/*,audio/*' hidden>"
    "<div class='attached' hidden><img alt='' hidden><span></span><button type='button' aria-label='Take it away'>×"
    "</button></div>"
)

SCRIPT: Final = """
const list = document.createElement('div');
list.className = 'talk';
element.appendChild(list);
function keep(parent, parts) {
  const known = new Map([...parent.children].map(node => [node.dataset.key, node]));
  let added = null;
  parts.forEach((part, place) => {
    let node = known.get(part.key);
    known.delete(part.key);
    if (!node) { node = document.createElement('div'); node.dataset.key = part.key; added = node; }
    if (parent.children[place] !== node) parent.insertBefore(node, parent.children[place] || null);
    if (node.className !== part.class) node.className = part.class;
    if (part.parts) keep(node, part.parts);
    else if (node.shown !== part.html) { node.innerHTML = part.html; node.shown = part.html; }
  });
  known.forEach(node => node.remove());
  return added;
}
let shows = 0, newest = null;
function show() {
  if (keep(list, props.value || [])) {
    requestAnimationFrame(() => window.scrollTo({top: document.documentElement.scrollHeight, behavior: 'smooth'}));
  }
  const answers = list.querySelectorAll('.answer'), last = answers[answers.length - 1];
  const clip = last && last.querySelector('video, audio');
  // What was there when the page was opened is not played unasked.
  if (clip && clip !== newest && shows > 1) clip.play().catch(() => {});
  newest = clip || newest;
  shows += 1;
}
show();
watch('value', show);
element.addEventListener('click', event => {
  const chip = event.target.closest('[data-say]');
  if (chip) trigger('say', {text: chip.dataset.say});
});
list.addEventListener('play', event => {
  list.querySelectorAll('video, audio').forEach(other => { if (other !== event.target) other.pause(); });
}, true);
list.addEventListener('error', event => {
  const clip = event.target.closest('figure');
  if (clip) clip.outerHTML = '<p class="gone">This clip is no longer kept.</p>';
  else if (event.target.matches('img')) event.target.remove();
}, true);
"""
"""Of the conversation. A new clip is played, once, and silences the others."""

HEADER_SCRIPT: Final = """
element.addEventListener('click', event => { if (event.target.closest('[data-new]')) trigger('fresh'); });
"""

ATTACH_SCRIPT: Final = """
const input = element.querySelector('input'), box = element.querySelector('.attached');
const picture = box.querySelector('img'), label = box.querySelector('span');
let local = null, note = '';
function show() {
  const value = props.value;
  box.hidden = !value && !note;
  label.textContent = value ? value.name : note;
  picture.hidden = !(value && local);
  if (local) picture.src = local;
}
function take(value, said, file) {
  if (local) URL.revokeObjectURL(local);
  local = file && file.type.startsWith('image/') ? URL.createObjectURL(file) : null;
  note = said.charAt(0).toUpperCase() + said.slice(1);
  props.value = value;
  show();
}
async function send(file) {
  // A server that hangs up while a browser is still sending is not heard.
  if (file.size > props.limit) {
    return take(null, `the file must have at most ${(props.limit / 2 ** 20).toFixed(1)} MB.`);
  }
  take(null, `sending ${file.name} …`);
  let said = 'the file could not be sent.';
  try {
    const answer = await fetch('page/uploads', {method: 'POST', body: file});
    const body = await answer.json();
    if (answer.ok) return take({token: body.token, name: file.name.slice(0, 200)}, '', file);
    said = body.error.message;
  } catch (error) { /* the sentence above says it */ }
  take(null, said);
}
element.querySelector('.attach').addEventListener('click', () => input.click());
box.querySelector('button').addEventListener('click', () => take(null, ''));
input.addEventListener('change', () => { if (input.files[0]) send(input.files[0]); input.value = ''; });
document.addEventListener('dragover', event => event.preventDefault());
document.addEventListener('drop', event => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
});
document.addEventListener('paste', event => { if (event.clipboardData.files[0]) send(event.clipboardData.files[0]); });
show();
watch('value', show);
"""

CSS: Final = """
:root, :root .dark { --page: 860px; --ease: cubic-bezier(.2, .7, .3, 1); }
.gradio-container, .gradio-container .app { padding: 0 !important; overflow: visible !important;
  background: var(--body-background-fill); }
.gradio-container main { width: 100%; max-width: var(--page) !important; margin: 0 auto !important;
  padding: 0 20px !important; }
.gradio-container main > .column { gap: 0; min-height: 100dvh; }
#header .html-container, #conversation .html-container, #attach .html-container { padding: 0; }

#header .html-container > div { display: flex; align-items: baseline; gap: 12px; padding: 22px 0 14px; }
#header h1 { margin: 0; font: 600 26px/1.1 Georgia, 'Times New Roman', serif; letter-spacing: -.01em; }
#header .facts { color: var(--body-text-color-subdued); font-size: 13px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
#header nav { margin-left: auto; display: flex; gap: 16px; font-size: 14px; white-space: nowrap; }
#header nav a, #header nav button { color: var(--body-text-color-subdued); text-decoration: none; cursor: pointer; }
#header nav a:hover, #header nav button:hover { color: var(--body-text-color); }

#conversation { flex: 1; }
.talk { display: flex; flex-direction: column; gap: 14px; padding: 10px 0 28px; font-size: 16px; line-height: 1.5; }
.talk p { margin: 0; overflow-wrap: anywhere; }
.talk svg { display: inline-block; width: 16px; height: 16px; vertical-align: -3px; margin-right: 4px; }
.welcome { padding: 9vh 0 0; max-width: 620px; }
.welcome h2 { margin: 0 0 10px; font: 600 34px/1.15 Georgia, 'Times New Roman', serif; letter-spacing: -.015em; }
.welcome p { color: var(--body-text-color-subdued); }
.welcome .hint { margin: 26px 0 10px; font-size: 14px; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; }
.chips button { padding: 8px 14px; border: 1px solid var(--border-color-primary); border-radius: 12px; cursor: pointer;
  font-size: 14px; line-height: 1.35; text-align: left; background: var(--background-fill-primary);
  color: var(--body-text-color); transition: border-color .15s, background .15s; }
.chips button:hover, .chips button:focus-visible { border-color: var(--color-accent);
  background: var(--color-accent-soft); }
.said { align-self: flex-end; max-width: 78%; padding: 10px 16px; border-radius: 18px 18px 4px 18px;
  background: var(--color-accent-soft); color: var(--body-text-color); }
.said:not(:first-child) { margin-top: 14px; }
.said .file { font-size: 14px; color: var(--body-text-color-subdued); }
.said .file:not(:last-child) { margin-bottom: 6px; }
.said .file img { display: block; width: 120px; height: 120px; object-fit: cover; border-radius: 10px;
  margin-bottom: 6px; }
.answer { display: grid; grid-template-columns: repeat(1, minmax(0, 360px)); gap: 14px; }
.answer.count2 { grid-template-columns: repeat(2, minmax(0, 300px)); }
.answer.count3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.answer.count4 { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.answer .prompt, .answer .error { grid-column: 1 / -1; }
.answer .prompt { color: var(--body-text-color-subdued); font-style: italic; }
.answer .error p, .answer p.error { padding: 10px 14px; border-radius: 12px; color: var(--error-text-color);
  background: var(--error-background-fill); border: 1px solid var(--error-border-color); }
.answer .gone { color: var(--body-text-color-subdued); }
.answer .text { max-width: 620px; }
.sample:has(.text) { grid-column: 1 / -1; }
.tile, .sample video { display: flex; width: 100%; aspect-ratio: var(--ratio, 1); border-radius: 16px;
  overflow: hidden; }
.sample video { background: #0b1020; object-fit: contain; animation: appear .4s var(--ease); }
.sample audio { width: 100%; }
.tile { flex-direction: column; align-items: center; justify-content: center; gap: 16px; padding: 16px;
  color: var(--body-text-color-subdued); font-size: 15px; text-align: center;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.tile .bar { width: min(200px, 80%); height: 6px; border-radius: 3px; background: var(--border-color-primary);
  overflow: hidden; }
.tile .bar i { display: block; height: 100%; border-radius: 3px; background: var(--color-accent);
  animation: breathe 1.6s ease-in-out infinite; }
.queue { display: flex; align-items: center; gap: 7px; }
.queue i, .queue b { width: 9px; height: 9px; border-radius: 50%; background: var(--border-color-primary); }
.queue i { background: var(--neutral-400); opacity: .6; }
.queue b { width: 12px; height: 12px; background: var(--color-accent); animation: breathe 1.6s ease-in-out infinite; }
.queue em { font-style: normal; font-size: 13px; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 10px; padding: 8px 2px 0;
  font-size: 13px; color: var(--body-text-color-subdued); }
figcaption span { white-space: nowrap; }
figcaption a { color: var(--link-text-color); text-decoration: none; white-space: nowrap; }
figcaption a:hover { text-decoration: underline; }
.edits { margin-top: 2px; animation: appear .4s var(--ease); }

#composer { position: sticky; bottom: 0; z-index: 5; flex: none; gap: 0; padding: 10px 0 14px;
  background: linear-gradient(transparent, var(--body-background-fill) 18px); }
#line { align-items: flex-end; flex-wrap: nowrap; gap: 8px; padding: 8px; border-radius: 20px; position: relative;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
  box-shadow: 0 6px 24px -12px rgb(15 23 42 / .25); }
#line:focus-within { border-color: var(--color-accent); }
#attach { flex: none; width: auto; min-width: 0 !important; }
#attach .attach { display: grid; place-items: center; width: 40px; height: 40px; border-radius: 12px; cursor: pointer;
  color: var(--body-text-color-subdued); }
#attach .attach:hover { background: var(--background-fill-secondary); color: var(--body-text-color); }
#attach .attach svg { width: 21px; height: 21px; }
#attach .attached { position: absolute; left: 0; bottom: calc(100% + 18px); display: flex; align-items: center;
  gap: 8px; width: max-content; max-width: min(80vw, 460px); padding: 6px 8px 6px 12px; border-radius: 12px;
  font-size: 14px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
  color: var(--body-text-color); box-shadow: 0 6px 24px -12px rgb(15 23 42 / .25); }
#attach, #attach .html-container { overflow: visible !important; }
#attach .attached[hidden], #attach [hidden] { display: none; }
#attach .attached img { width: 36px; height: 36px; object-fit: cover; border-radius: 8px; }
#attach .attached span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#attach .attached button { width: 24px; height: 24px; border-radius: 50%; cursor: pointer; font-size: 18px;
  line-height: 1; }
#said { flex: 1; min-width: 0 !important; border: 0; background: none; box-shadow: none; overflow: visible; }
#said textarea { padding: 9px 4px; border: 0; background: none; box-shadow: none; font-size: 16px; line-height: 22px;
  min-height: 40px; }
#said .input-container { align-items: flex-end; border: 0; background: none; }
#said .submit-button { width: 40px; height: 40px; margin: 0; padding: 9px; border-radius: 12px; color: #fff;
  background: var(--color-accent); }
#said .submit-button:hover { filter: brightness(1.1); }
#line:has(#stop) .submit-button { display: none; }
#stop { flex: none; min-width: 0 !important; height: 40px; padding: 0 16px; border-radius: 12px; }
#settings { border: 0; background: none; box-shadow: none; padding: 8px 10px 0; }
#settings .label-wrap { width: auto; gap: 8px; align-items: center; justify-content: flex-start; font-size: 13px;
  color: var(--body-text-color-subdued); }
#settings .label-wrap .icon, #settings .reset-button { display: none; }
#settings .label-wrap::after { content: ''; width: 6px; height: 6px; margin-top: -3px; transform: rotate(45deg);
  border: solid currentColor; border-width: 0 1.5px 1.5px 0; }
#settings .label-wrap.open::after { margin-top: 3px; transform: rotate(225deg); }
#settings > div:last-child { margin: 8px -10px 0; padding: 12px 16px; max-height: 46dvh; overflow: auto;
  border: 1px solid var(--border-color-primary); border-radius: 18px; background: var(--background-fill-primary); }
#settings .column { gap: 10px; }
#settings .form { gap: 6px 28px; border: 0; background: none; box-shadow: none; }
#settings .block { padding: 4px 0; border: 0; background: none; box-shadow: none; }
#settings .info-text { font-size: 12px; color: var(--body-text-color-subdued); }
#settings fieldset .wrap { gap: 6px; }
#settings fieldset label { padding: 5px 12px; font-size: 14px; border-radius: 10px; background: none;
  border: 1px solid var(--border-color-primary); }
#settings fieldset label.selected { border-color: var(--color-accent); background: var(--color-accent-soft);
  color: var(--body-text-color); }

@keyframes appear { from { opacity: 0; transform: translateY(6px); } }
@keyframes breathe { 50% { opacity: .45; } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
@media (max-width: 640px) {
  .gradio-container main { padding: 0 14px !important; }
  #header { padding: 14px 0 8px; gap: 10px; }
  #header .facts { display: none; }
  .welcome { padding-top: 5vh; }
  .welcome h2 { font-size: 28px; }
  .said { max-width: 88%; }
  .answer.count2, .answer.count3, .answer.count4 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
"""
