"""A studio in the browser, which works by the files and the commands of the command line."""
