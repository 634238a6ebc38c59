"""One file for each way to specialise; a file that defines ``METHOD`` is found."""
