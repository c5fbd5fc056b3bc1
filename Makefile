# A thin alias: everything is in ./run, which needs no make.
.PHONY: help generate test clean

help generate test clean:
	@./run $@
