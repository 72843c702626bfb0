"""Report of runs: one self-contained HTML page, drawn as SVG by its template."""
