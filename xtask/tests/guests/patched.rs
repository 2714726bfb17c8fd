//! A kernel that patches its own code while its CPUs run it: ftrace, kprobes, static keys.

use xtask::story::Home;

#[test]
fn a_kernel_traces_itself_while_it_runs() {
    let home = Home::new();
    home.yado(&["run", "-q", "debian", "--name", "patched", "--cpus", "2", "--detach"]).assert_success();
    let told = home.in_guest("patched", SCRIPT);
    let line = |name: &str| {
        let found = told.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        found.unwrap_or_else(|| panic!("no {name} in {told}")).to_owned()
    };
    let number = |name: &str| line(name).parse::<u64>().unwrap_or_else(|_| panic!("{name} in {told}"));
    assert!(number("functions:") > 1000, "{told}");
    assert_eq!(line("copied:"), ["100000"; 6].join(" "));
    assert!(number("opened:") >= 50 && number("middle:") >= 50 && number("read:") >= 50, "{told}");
    assert_eq!(line("missed:"), "0");
    assert!(number("switches:") > 0, "{told}");
    assert_eq!(line("complaints:"), "0", "{}", home.in_guest("patched", "dmesg"));
    home.yado(&["stop", "patched"]).assert_success();
    home.yado(&["rm", "patched"]).assert_success();
    home.assert_nothing_left();
}

/// Each step makes the kernel rewrite instructions that another process runs all the time on the other CPU.
const SCRIPT: &str = r#"
set -e
cd /sys/kernel/tracing 2>/dev/null
[ -e current_tracer ] || { mount -t tracefs tracefs /sys/kernel/tracing; cd /sys/kernel/tracing; }
(while :; do cat /proc/self/stat; done) > /dev/null & busy=$!
trap 'kill $busy' EXIT
echo function > current_tracer; sleep 0.2; echo nop > current_tracer
wc -l < available_filter_functions | sed 's/^/functions: /'
copied=
for turn in 1 2 3 4 5 6; do
    echo 'vfs_*' > set_ftrace_filter; echo function > current_tracer
    copied="$copied $(head -c 100000 /dev/zero | wc -c)"
    echo nop > current_tracer; echo > set_ftrace_filter
done
echo copied: $copied
echo 'p:opened do_sys_openat2' > kprobe_events
echo 'r:read ksys_read $retval' >> kprobe_events
# After the place that ftrace patches: an INT3, or a jump that replaces several instructions.
for offset in 9 10 11 12 13 14 15 16; do
    if echo "p:middle do_sys_openat2+$offset" >> kprobe_events; then break; fi
done 2>/dev/null
echo 1 > events/kprobes/enable
for turn in $(seq 50); do cat /etc/hostname > /dev/null; done
echo 0 > events/kprobes/enable
awk '{ print $1 ": " $2; missed += $3 } END { print "missed: " missed + 0 }' kprobe_profile
echo > kprobe_events
echo > trace
for turn in 1 2 3 4 5 6; do
    echo 1 > events/sched/enable; echo 1 > events/syscalls/enable; sleep 0.05
    echo 0 > events/syscalls/enable; echo 0 > events/sched/enable
done
echo switches: $(grep -c sched_switch: trace)
echo complaints: $(dmesg | grep -cE 'BUG|Oops|WARNING|general protection|ftrace bug' || true)
"#;
