"""Others' ops under the names of ours, one file for each library; a library that is not installed is reported so."""
