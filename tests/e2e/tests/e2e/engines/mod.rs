//! Containers that podman and docker run with `kvrun`.
//!
//! An engine takes long to do anything here, and a machine longer: so each test looks at all that one container has to show.

pub(crate) mod docker;
pub(crate) mod podman;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::engine::IMAGE;
use kvrun_e2e::{Running, Test};

/// A command line: words without spaces in them, then any.
fn words<'a>(text: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    text.split_ascii_whitespace().chain(more.iter().copied()).collect()
}

/// `run` with about every option that both engines have; what is asked for is what the container has.
fn run_with_options(t: &Test, run: impl FnOnce(&[&str]) -> Result<Running>) -> Result<()> {
    let (dir, file) = (t.scratch().join("volume"), t.scratch().join("file"));
    fs::create_dir(&dir)?;
    fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    fs::write(&file, "content\n")?;
    let volumes = [format!("{}:/dir", dir.display()), format!("{}:/etc/file:ro", file.display())];
    let script = "cat; echo problem >&2; uname -r >&2; exec 2>/dev/null
        id -u; id -g; hostname; echo $GREETING; pwd; grep CapBnd /proc/self/status
        cat /etc/file; echo x > /etc/file || echo file: no; echo x > /file || echo root: no
        echo hello > /dir/new; echo x > /scratch/file && cat /scratch/file; df -k /scratch | tail -1 | awk '{print $2}'
        cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; nproc; cat /proc/sys/net/ipv4/ip_forward; exit 7";
    let options = "run --rm -i --read-only --tmpfs /scratch:size=1m,mode=1777 --user 1000:1001 --cap-drop all --hostname named \
                   --env GREETING=hello --workdir /tmp --memory 96m --cpus 0.5 --pids-limit 40 --sysctl net.ipv4.ip_forward=1";
    let mut run = run(&words(options, &["-v", &volumes[0], "-v", &volumes[1], IMAGE, "sh", "-c", script]))?;
    run.stdin.take().context("no stdin")?.write_all(b"from outside\n")?;
    let outcome = run.wait()?.exited(7).stdout(
        "from outside\n1000\n1001\nnamed\nhello\n/tmp\nCapBnd:\t0000000000000000\n\
         content\nfile: no\nroot: no\nx\n1024\n\
         100663296\n50000 100000\n40\n1\n1\n",
    );
    ensure!(fs::read_to_string(dir.join("new"))? == "hello\n");
    is_a_guests_kernel(outcome.stderr.strip_prefix("problem\n").context("no stderr")?)
}

/// Checks a line of `uname -r`.
fn is_a_guests_kernel(release: &str) -> Result<()> {
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(
        !release.trim().is_empty() && release != host,
        "the container has the kernel of the host: {release}"
    );
    Ok(())
}

/// Serves a page, has a volume, is asked to end, and says how often it was started.
const SERVICE: &str = "trap 'echo bye; exit 3' TERM; echo x >> /named/starts; mkdir -p /www; echo served > /www/page; httpd -h /www -p 80
    echo started $(wc -l < /named/starts); sleep 1000 & wait";

/// The options for [`SERVICE`].
const SERVICE_OPTIONS: &str = "run -d --name web -v named:/named -p 8080:80 --health-retries 1 --health-cmd";

/// Gets its page at an address.
pub(crate) fn is_served(address: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    write!(stream, "GET /page HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.contains("200 OK") && answer.ends_with("\r\n\r\nserved\n"), "{address}: {answer}");
    Ok(())
}
