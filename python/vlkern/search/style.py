"""The style sheet of the report; follows the reader's light or dark scheme."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #1f2328; --soft: #626a73; --rule: #e2dfd9; --card: #fff;
  --ours: #0a6f66; --rival: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e7e5e1; --soft: #9aa3ad; --rule: #2e343b;
  --card: #1d2126; --ours: #4cc3b5; --rival: #f0935b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; margin: 3.25rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p { max-width: 44rem; margin: 0 0 1rem; }
header p, section > p { color: var(--soft); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; font-size: .85em; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem;
  overflow-x: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 40vw), 1fr)); gap: .75rem;
  margin: 1.75rem 0 0; }
dl div { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .7rem .9rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: .1rem 0 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.query { font-size: 1.05rem; margin: 1.6rem 0 .6rem; }
.query::before { content: "\\201C"; color: var(--soft); } .query::after { content: "\\201D"; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(8, 1fr); gap: .75rem; }
@media (max-width: 52rem) { .cards { grid-template-columns: repeat(4, 1fr); gap: .6rem; } }
figure { margin: 0; min-width: 0; }
.picture { background: #fff; border: 1px solid var(--rule); border-radius: .5rem; aspect-ratio: 1; padding: 9%; }
img { width: 100%; height: 100%; object-fit: contain; display: block; }
figcaption { font-size: .75rem; line-height: 1.35; margin-top: .35rem; overflow-wrap: anywhere; }
figcaption span { display: block; color: var(--soft); font-variant-numeric: tabular-nums; }
.crops { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; }
.crops img { height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .45rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
tbody th { font-weight: 600; }
.note { color: var(--soft); font-size: .8rem; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1.25rem; margin-bottom: 1rem; }
.charts.one { grid-template-columns: minmax(0, 34rem); }
@media (max-width: 52rem) { .note { display: block; } th, td { padding: .45rem .4rem; font-size: .9rem; }
  .charts, .charts.one { grid-template-columns: minmax(0, 1fr); } }
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; }
svg text { fill: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums; }
svg .title, svg .small { fill: var(--soft); } svg .small { font-size: 12px; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke-linecap: round; }
.line.ours { stroke: var(--ours); } circle.ours { fill: var(--ours); }
.line.rival { stroke: var(--rival); } circle.rival { fill: var(--rival); }
rect.ours { fill: var(--ours); } rect.rival { fill: var(--rival); } rect.pale { opacity: .35; }
.line.faint { stroke: var(--ours); stroke-width: 1; opacity: .35; }
"""
