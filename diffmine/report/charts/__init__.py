"""Manifest, scores and losses -> small SVG charts, one subject a file.

Each says in its aria-label what it shows. Colours come from charts.css, by class.
"""
