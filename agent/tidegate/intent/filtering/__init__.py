"""Filter expressions over objects in Consul's JSON: `MutualTLSMode == "permissive" and not web in Name`.

The language is hashicorp/go-bexpr's. `filter` is what others use. `tree` has what an expression is and how it is
written, `grammar` reads it, `shapes` says what kind of object is filtered, `checking` refuses what cannot apply to
that, `evaluation` decides. `values` has Go's rules by which the text of a value becomes a number or a bool,
`patterns` regular expressions that cannot run away, `fault` the error that points at a column.
"""
