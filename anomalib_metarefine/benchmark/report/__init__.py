"""Tables and figures of what `metarefine bench` measured."""
