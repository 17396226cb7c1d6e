"""Random frames, cut at random places: what the lane makes of them is what the client's own codec reads in them.

`making` invents what a broker sends, `reading` reads it with pamqp, `lanes` has the lane read it, `cases` compares.
`python -m tests.fuzz` goes on for as long as it is told.
"""
