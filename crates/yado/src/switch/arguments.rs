//! The options of `yado switch` and `yado net`.

use clap::builder::ValueHint;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// `yado switch`
#[derive(Debug, Args)]
pub struct Switch {
    #[command(subcommand)]
    pub command: SwitchCommand,
}

#[derive(Debug, Subcommand)]
pub enum SwitchCommand {
    /// Start a switch: a process of its own, which needs no privilege
    Create(Create),
    /// List the switches that run
    Ls(Json),
    /// Show a switch's ports: what they are allowed, and what has gone through
    Ports(One),
    /// Show each port's rates, and what was dropped for which reason
    Stats(Stats),
    /// Show which addresses are behind which port
    Addresses(One),
    /// Show who wants which groups of multicast, and where its routers are
    Multicast(One),
    /// Add a port: a vhost-user socket for another VMM, or an interface of this host's
    Add(Add),
    /// Change a port while it works
    Set(Set),
    /// Limit what a group of ports, or all of a switch, sends and gets
    Limit(Limit),
    /// Remove a port
    Remove(Port),
    /// Copy what goes through ports into a pcapng file, until interrupted
    Mirror(Mirror),
    /// Stop switches
    Rm(Rm),
    /// Be a switch
    #[command(hide = true)]
    Serve(Create),
}

#[derive(Debug, Args)]
pub struct Json {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct One {
    /// The switch
    pub name: String,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Stats {
    /// The switch
    pub name: String,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// How long to measure
    #[arg(long, short = 'i', value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
    /// Measure so often
    #[arg(long, short = 'n', value_name = "TIMES", default_value_t = 1)]
    pub count: u32,
}

#[derive(Debug, Clone, Args)]
pub struct Create {
    /// Its name
    pub name: String,
    /// Do not go into the background
    #[arg(long)]
    pub foreground: bool,
    /// How long a port that is silent is still polled: less sleep, shorter delays
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50)]
    pub poll: u64,
    /// How many addresses it learns
    #[arg(long, value_name = "N", default_value_t = net::switch::ADDRESSES_MAX)]
    pub addresses: usize,
    /// After how many seconds it forgets an address that was not seen
    #[arg(long, value_name = "SECONDS", default_value_t = net::switch::AGEING_SECONDS)]
    pub ageing: u32,
}

#[derive(Debug, Args)]
pub struct Add {
    /// The switch
    pub name: String,
    /// The port's name
    pub port: String,
    /// What it is allowed: vlan=N, trunk=A-B+C, native=N, trust, private, down=RATE and more (see `yado help switch set`)
    #[arg(long, short = 'o', value_name = "OPTION[,...]", default_value = "", hide_default_value = true)]
    pub options: String,
    /// Connect it to this tap of the host's, which is made if it is not there
    #[arg(long, value_name = "INTERFACE")]
    pub tap: Option<String>,
    /// Connect it to another host's switch (yado's, or any VXLAN): ADDRESS[:PORT],vni=NUMBER[,local=ADDRESS[:PORT]]
    #[arg(long, value_name = "ADDRESS,vni=N", conflicts_with = "tap")]
    pub vxlan: Option<net::vxlan::Config>,
}

#[derive(Debug, Args)]
#[command(after_help = concat!(
    "Options, with commas between them; `off` and `none` take a thing back:\n",
    "  vlan=N               one VLAN, without tags\n",
    "  trunk=A-B+C          VLANs with tags\n",
    "  native=N             of a trunk: the VLAN of frames without a tag\n",
    "  service-tags         of a trunk: tags of 802.1ad\n",
    "  tunnel=N             one VLAN that carries whatever tags frames have\n",
    "  priority=P           priority (0 to 7) of frames that have none\n",
    "  mac=ADDRESS[+...]    the only addresses that the port may have\n",
    "  macs=N               how many addresses it may have (16)\n",
    "  ip=ADDRESS[+...]     IP addresses that are this port's alone\n",
    "  trust                it may have any address, be a router and a DHCP server\n",
    "  private              it reaches no other private port\n",
    "  bpdu-guard           a bridge behind it turns it off\n",
    "  storm=FRAMES         floods each second (20000)\n",
    "  up=, down=, rate=    limit of what it sends, of what it gets, of both: 500k, 10M, 2.5G bits each second\n",
    "  burst=BYTES          of the limits: what goes through at once\n",
    "  pps=FRAMES           of the limits: frames each second\n",
    "  group=NAME           it shares the limits of this group (see `yado help switch limit`)\n",
    "  weight=N             its part, beside others' weights (1), of limits that it shares\n",
    "  min=RATE             what it has of them before others; min-up=, min-down=\n",
    "  delay=, jitter=MS    a bad line to the port\n",
    "  loss=, duplicate=, reorder=PERCENT\n",
    "  disabled             it carries nothing"
))]
pub struct Set {
    /// The switch
    pub name: String,
    /// The port
    pub port: String,
    /// What changes: OPTION[,...]
    #[arg(required = true)]
    pub options: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = concat!(
    "Options, with commas between them; `none` takes a thing back:\n",
    "  up=, down=, rate=    of what its ports send, of what they get, of both: 500k, 10M, 2.5G bits each second\n",
    "  burst=BYTES          of the limits: what goes through at once\n",
    "  pps=FRAMES           of the limits: frames each second\n",
    "  weight=N             a group's part, beside other groups and ports of none (1), of the limits of the switch\n",
    "  min=RATE             what it has of them before others; min-up=, min-down=\n",
    "Ports join with `yado switch set NAME PORT group=GROUP`, and share with weight= and min= of their own."
))]
pub struct Limit {
    /// The switch
    pub name: String,
    /// What changes: OPTION[,...]; nothing: show the limits
    pub options: Vec<String>,
    /// The group, which is made if it is not there (default: all of the switch)
    #[arg(long, short = 'g')]
    pub group: Option<String>,
    /// Remove the group
    #[arg(long, requires = "group", conflicts_with = "options")]
    pub remove: bool,
    /// Show as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Port {
    /// The switch
    pub name: String,
    /// The port
    pub port: String,
}

#[derive(Debug, Args)]
pub struct Mirror {
    /// The switch
    pub name: String,
    /// The ports (default: all)
    pub ports: Vec<String>,
    /// The file, or `-`
    #[arg(short = 'w', long = "write", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Bytes of each frame
    #[arg(short = 's', long, value_name = "BYTES", default_value_t = net::switch::capture::SNAP_DEFAULT)]
    pub snap: u32,
    /// End after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Rm {
    /// The switches
    #[arg(required = true)]
    pub names: Vec<String>,
}

/// `yado net`
#[derive(Debug, Args)]
pub struct Net {
    #[command(subcommand)]
    pub command: NetCommand,
}

#[derive(Debug, Subcommand)]
pub enum NetCommand {
    /// Show the ports of all switches, and the cards of guests on `--net user` and taps, busiest first
    Top(Top),
    /// Copy a guest's frames into a pcapng file, until interrupted: those of its ports if it is on a switch, else those of its
    /// cards
    Capture(Capture),
}

#[derive(Debug, Args)]
pub struct Top {
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// How long to measure
    #[arg(long, short = 'i', value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
}

#[derive(Debug, Args)]
pub struct Capture {
    /// A guest, or SWITCH:PORT
    pub name: String,
    /// The file, or `-`
    #[arg(short = 'w', long = "write", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Bytes of each frame
    #[arg(short = 's', long, value_name = "BYTES", default_value_t = net::switch::capture::SNAP_DEFAULT)]
    pub snap: u32,
    /// End after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
}
