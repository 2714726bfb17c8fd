//! NUMA nodes as Debian finds them: what yado says in ACPI is what the guest's kernel works with.

use xtask::story::Home;

/// What the guest's kernel says of its nodes, one fact a line.
const LOOK: &str = "cd /sys/devices/system/node; cat online; for node in node*; do echo $node cpus $(cat $node/cpulist) distance \
                    $(cat $node/distance) total $(awk '/MemTotal/ { print $4 }' $node/meminfo); done";

#[test]
fn described_nodes_are_found_with_their_distances_and_speeds() {
    let home = Home::new();
    let script = format!(
        "{LOOK}; for of in node0/access0 node2/access0; do echo $of $(cat $of/initiators/read_latency \
         $of/initiators/read_bandwidth) by $(cd $of/initiators && ls -d node*); done; dmesg | grep -c 'WARNING' || true"
    );
    #[rustfmt::skip]
    let words = [
        "run", "-q", "--engine", "soft", "--cpus", "3", "-m", "768M",
        "--numa", "cpus=0+2,memory=384M,latency=90,bandwidth=40000", "--numa", "cpus=1,latency=100,bandwidth=30000",
        "--numa", "memory=128M,latency=300,bandwidth=8000", "--numa", "distance=0:1:21", "--numa", "distance=0:2:40",
        "--numa", "distance=1:2:50", "debian", "--", "bash", "-c", &script,
    ];
    let finished = home.yado(&words);
    finished.assert_success();
    let text = finished.text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "0-2", "{text}");
    let megabytes = |line: &str| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap() >> 10;
    for (line, start, least, most) in [
        (lines[1], "node0 cpus 0,2 distance 10 21 40 total ", 256, 384),
        (lines[2], "node1 cpus 1 distance 21 10 50 total ", 200, 256),
        (lines[3], "node2 cpus distance 40 50 10 total ", 100, 128),
    ] {
        assert!(line.starts_with(start) && (least..=most).contains(&megabytes(line)), "{text}");
    }
    assert_eq!(lines[4], "node0/access0 90 40000 by node0", "{text}");
    assert_eq!(lines[5], "node2/access0 300 8000 by node0", "{text}");
    assert_eq!(lines[6], "0", "the kernel warns of nothing");
}

/// B12: memory in small containers, each held to its own by a cpuset.
#[test]
fn a_task_stays_within_its_fake_node() {
    let home = Home::new();
    let script = format!(
        "{LOOK} | wc -l; \
         cd /sys/fs/cgroup && echo +cpuset > cgroup.subtree_control && mkdir small && echo 5 > small/cpuset.mems && \
         cat small/cpuset.mems.effective && before=$(awk '/MemFree/ {{ print $4 }}' /sys/devices/system/node/node5/meminfo); \
         (echo $BASHPID > small/cgroup.procs; head -c 24M /dev/zero > /dev/shm/data); \
         after=$(awk '/MemFree/ {{ print $4 }}' /sys/devices/system/node/node5/meminfo); echo $((before - after)); \
         (echo $BASHPID > small/cgroup.procs; echo 1000 > /proc/self/oom_score_adj; head -c 1G /dev/zero | tail) > /dev/null 2>&1; echo ended $?"
    );
    #[rustfmt::skip]
    let words =
        ["run", "-q", "--engine", "soft", "-m", "1G", "--numa", "fake=16", "debian", "--", "bash", "-c", &script];
    let finished = home.yado(&words);
    finished.assert_success();
    let text = finished.text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..3], ["0-15", "16", "5"], "16 nodes, and the one of the cpuset: {text}");
    assert!(lines[3].parse::<u64>().unwrap() >= 20 << 10, "24 MiB come from node 5: {text}");
    assert_eq!(lines[4], "ended 137", "a GiB does not fit into 64 MiB: {text}");
}
