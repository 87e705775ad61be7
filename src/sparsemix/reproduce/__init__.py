"""The tables and figures of the papers, each made anew at a scale, with the paper's numbers beside ours."""
