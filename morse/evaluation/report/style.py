"""How the report's page looks: dark on light, or light on dark where the reader prefers that."""

CSS = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --back: #ffffff;
  --band: #f3f5f7; --line: #d5dae0; --accent: #a63c00; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #a3adb8; --back: #14181d;
  --band: #1d232a; --line: #39424c; --accent: #ffa468; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
section:first-of-type h2 { margin-top: 0; border: 0; padding: 0; }
p { max-width: 48rem; margin: .5rem 0; overflow-wrap: anywhere; }
.note, figcaption { color: var(--soft); font-size: .875rem; margin-top: .25rem; }
pre { background: var(--band); padding: .6rem .8rem; border-radius: 4px; font-size: .8125rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0 .25rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 1.5rem); }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; }
tbody th { font-weight: 400; }
tbody th.text { white-space: nowrap; }
.text { text-align: left; white-space: normal; min-width: 5.5rem; max-width: 24rem; }
th:first-child { position: sticky; left: 0; background: var(--back); }
tbody tr:hover > * { background: var(--band); }
.strong > * { font-weight: 600; }
.strong > th { color: var(--accent); }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 4px;
  padding: .4rem .75rem; }
details caption { display: none; }
summary { cursor: pointer; }
.quality { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; }
.quality img { display: block; width: 100%; max-width: 40rem; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: 4px; }
.pictures { overflow-x: auto; }
.pictures figure { display: grid; grid-template-columns: minmax(7rem, 15rem) 1fr;
  align-items: center; gap: .5rem; margin-bottom: 2px; }
.pictures figcaption { margin: 0; order: -1; }
.pictures img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
@media (max-width: 600px) {
  h1 { font-size: 1.35rem; }
  th, td { padding: .25rem .45rem; }
  tbody th.text { white-space: normal; min-width: 6.5rem; }
  .text { min-width: 4.5rem; }
  .pictures figure { grid-template-columns: 1fr; gap: 0; margin-bottom: .4rem; }
}
@media print {
  details::details-content { content-visibility: visible; block-size: auto; }
  .wide { overflow: visible; }
}
"""
