# kvrun. The two commands of a fresh Debian machine, as root: `make demo` and `make test`.
#
#   make demo             run a container in a micro-VM and look at it
#   make test             everything CI runs
#   make bench            measure; table on the terminal, numbers in target/bench/latest.json
#   make soak PODS=200    that many pods one after another, and 30 at once: nothing may be left of them; then 1 GiB over TCP and of output
#   make fuzz             a minute of fuzzing for each thing that reads a stranger's bytes
#   make build            all of kvrun, in target/stage
#   make image            the container image that puts it on the nodes of a cluster (docs/kubernetes.md)
#   make install PREFIX=  copy it to PREFIX (default /usr/local)

PREFIX ?= /usr/local
STAGE := target/stage
RELEASE := target/x86_64-unknown-linux-gnu/release

.PHONY: demo test bench soak fuzz build image install setup clean

setup:
	tests/setup

build: setup
	guest-kernel/build >/dev/null
	tests/cargo-cache restore target
	cargo build --release --locked -p kvrun -p containerd-shim-kvrun-v2 -p kvrun-vmm -p kvrun-agent
	$(MAKE) --no-print-directory install PREFIX=$(STAGE)

# The layout `kvrun` expects around itself. Files are replaced, not written over, so running machines keep theirs.
install:
	@test -x $(RELEASE)/kvrun || { echo "run 'make build' first"; exit 1; }
	install -D -m755 $(RELEASE)/kvrun $(DESTDIR)$(PREFIX)/bin/kvrun
	install -D -m755 $(RELEASE)/containerd-shim-kvrun-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-kvrun-v2
	install -D -m755 $(RELEASE)/kvrun-vmm $(DESTDIR)$(PREFIX)/libexec/kvrun/kvrun-vmm
	install -D -m644 $$(guest-kernel/build --path) $(DESTDIR)$(PREFIX)/share/kvrun/vmlinux
	agent/mkinitramfs $(DESTDIR)$(PREFIX)/share/kvrun/initramfs.cpio $(RELEASE)/kvrun-agent

image: build
	@shim/deploy/image $(STAGE) target/kvrun-image.tar

demo: build
	tests/demo

test: build
	tests/all

bench: build
	cargo build --release --locked -p kvrun-bench
	tests/bench/bench

PODS ?= 200
# A test may take 30 s times the factor.
soak: build
	KVRUN_E2E_PODS=$(PODS) KVRUN_TIMEOUT_FACTOR=$$(($(PODS) + 20)) tests/e2e/run soak
	KVRUN_E2E_TCP_MIB=1024 KVRUN_TIMEOUT_FACTOR=60 tests/e2e/run pod_is_on_links
	KVRUN_E2E_OUTPUT_MIB=1024 KVRUN_TIMEOUT_FACTOR=60 tests/e2e/run output_arrives

fuzz: setup
	tests/fuzz/run

clean:
	rm -rf target
