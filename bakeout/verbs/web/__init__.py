"""`bakeout web`: a page that runs a clamped folder in the browser, and the server that it is on."""
