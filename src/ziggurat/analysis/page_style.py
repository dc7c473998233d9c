"""The report's style sheet: light and dark, a phone and a desk."""

STYLE = """
:root{--ink:#1d2733;--soft:#5b6775;--paper:#fff;--card:#f6f7f9;--line:#dde1e6;--hot:#14345f;
--mid:#3a97a8;--cold:#e6f2f0;
--neg:#a4402f;--none:#cfcfcf;--c0:#1b6ca8;--c1:#d1495b;--c2:#2a9d8f;--c3:#b7791f;--c4:#7b5ea7;--c5:#5c6b73;--c6:#0b7a4b;--c7:#a33b8f;
color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e7ebf0;--soft:#a3adb9;--paper:#12161b;--card:#1b2128;--line:#323b45;
--hot:#bdf0f4;
--mid:#3f9fb2;--cold:#1d333d;--neg:#f0907c;--none:#3b3f45;--c0:#6db7ee;--c1:#f28a97;--c2:#5fd3c4;--c3:#e8b45a;--c4:#b79fe0;
--c5:#a9b7bf;--c6:#58cf98;--c7:#e58ad4}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:16px}h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:1.6em 0 .5em;overflow-wrap:anywhere}.s{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{text-align:left;padding:5px 18px 5px 0;
border-bottom:1px solid var(--line);vertical-align:top;max-width:26em;overflow-wrap:break-word}
th{font-weight:600}th,td:first-child{color:var(--soft)}
.two{display:flex;flex-wrap:wrap;gap:0 56px}.two section{max-width:100%}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px;align-items:start}
.grid p{grid-column:1/-1;margin:0;overflow-wrap:anywhere}.note{color:var(--c1)}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:6px}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}text{fill:var(--ink)}
.t{font-weight:700;font-size:12.5px}
.n{fill:var(--soft)}.e{text-anchor:end}.m{text-anchor:middle}.w{fill:var(--paper)}.k{fill:var(--ink)}
.g{stroke:var(--line)}.l{fill:none;stroke:var(--c);stroke-width:2}.p,.b{fill:var(--c)}
.h{fill:color-mix(in oklab,var(--mid) var(--v),var(--cold))}.i{fill:color-mix(in oklab,var(--hot) var(--v),var(--mid))}
.y{fill:color-mix(in oklab,var(--neg) var(--v),var(--cold))}.x{fill:var(--none)}
.h,.i,.y,.x{stroke:var(--card);stroke-width:1}.q{stroke:none}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}details{margin:1.2em 0}summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);padding:10px;border-radius:8px}
details p{color:var(--soft);overflow-wrap:anywhere}
""".replace("\n", "")
