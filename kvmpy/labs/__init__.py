"""The exercises of the pages in docs/, and a grader that runs the student's guest.

`model` says what an exercise is, `checks` what can be asked of a run, `grade` runs a guest and
collects the answers, `pageN` has the exercises of a page, and `table` all of them.
"""
