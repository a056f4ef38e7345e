"""The style sheet of the report: on a screen, on a phone, in the dark, and in print."""

STYLE = """
:root{--ink:#15202b;--soft:#5b6b7a;--line:#d8e0e7;--strong:#0b63c5;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#93a4b3;--line:#2c3a47;
--strong:#6cb0ff;--back:#0f1720}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--back);max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
.lead{font-size:1.05rem}.soft{color:var(--soft)}
.unmet{border-left:4px solid #c2410c;padding:.1rem .8rem}
.figures{display:grid;grid-template-columns:repeat(3,1fr);gap:.7rem;
margin:1rem 0}
.figures div{border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.figures b{display:block;font-size:1.25rem}.figures small{color:var(--soft)}
.wide,.plot{overflow-x:auto}.plot svg{display:block}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}code{font-size:.85em;overflow-wrap:anywhere}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}
svg .axis{stroke:var(--soft);fill:none}svg .grid{stroke:var(--line)}
svg .bar{stroke:var(--soft);stroke-width:1.5}svg .limit{stroke:#c2410c;stroke-dasharray:4 3}
svg text{fill:var(--ink)}svg .small{fill:var(--soft);font-size:11px}svg .cell{font-size:9px}
svg .line{stroke:var(--strong);stroke-width:2;fill:none}
svg .point{fill:var(--soft)}svg .chosen{fill:var(--strong)}svg .label{font-size:11px}
svg .strong{fill:var(--strong);font-weight:600}
@media(max-width:40rem){.figures{grid-template-columns:repeat(2,1fr)}
svg .small,svg .label{font-size:16px}table.cards tr{display:block;padding:.5rem 0;
border-bottom:1px solid var(--line)}table.cards tr:first-child{display:none}
table.cards td{display:block;border:0;padding:.1rem 0}
table.cards td[data-label]::before{content:attr(data-label) ": ";color:var(--soft)}
table.cards td:empty{display:none}table:not(.cards) td{display:block;padding:.1rem 0;border:0}
table:not(.cards) tr{display:block;padding:.4rem 0;border-bottom:1px solid var(--line)}
table:not(.cards) td:first-child{color:var(--soft)}}
@media(min-width:40.01rem){table.cards td:first-child code,
table.cards td:not(:first-child):not(:last-child){white-space:nowrap}
table:not(.cards) td:first-child{width:11rem}}
@media print{body{max-width:none;padding:0;font-size:11pt}h2{break-after:avoid}
svg,tr,.figures div{break-inside:avoid}.wide,.plot{overflow:visible}.plot svg{max-height:9cm}
:root{--ink:#000;--soft:#444;--line:#bbb;--strong:#0b4fa0;--back:#fff}
*{print-color-adjust:exact}}
"""
