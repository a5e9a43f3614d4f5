"""`danceopd serve`: a student behind HTTP, in the shape of OpenAI's images API.

`schema.py` what is asked and answered, `worker.py` the one thread that draws, `app.py` the routes, `guard.py` who may
ask and how much is read, `metrics.py` the figures, `page.html.j2` the page, `commands.py` the command.
"""
