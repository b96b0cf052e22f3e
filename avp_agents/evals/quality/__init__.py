"""``avp-agents bench quality``: are answers on a handed-over context as good as on text, and how much faster?

tasks.py       problems, prompts, and how an answer is scored
arms.py        how agents work together: latent, text, and the controls
run.py         all arms on all problems, resumable
summary.py     accuracy with intervals, paired tests, tokens, seconds
plots.py       what people would rather look at
report.py      one HTML file
"""
