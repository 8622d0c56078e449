"""Where models come from: a URI becomes a directory on this machine.

`location` reads a URI, `hub`, `s3` and `oci` each ask one kind of source, `cache` and `claim` keep copies that several
workers share, `fetch` joins them, `process` runs that in a process of its own, and `aside` is its end in the worker.
Nothing here knows what is done with a model.
"""
