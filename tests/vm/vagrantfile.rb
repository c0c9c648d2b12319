# What the Vagrantfile says, as JSON: `ruby vagrantfile.rb VAGRANTFILE`. Each machine has its hostname, its address, and
# what is provisioned, in Vagrant's order. What the Vagrantfile must not use, such as a synced folder, is no method here.

require "json"

class Said
  attr_writer :box
  attr_accessor :hostname, :address
  attr_reader :provisions, :machines

  def initialize(provisions)
    @provisions = provisions
    @machines = {}
  end

  def vm = self

  def synced_folder(_here, _there, disabled:)
    raise "a folder is synced" unless disabled
  end

  def provision(kind, **options)
    @provisions << { kind: kind, **options }
  end

  def network(kind, ip:)
    raise "#{kind} is no network that every provider has" unless kind == "private_network"
    @address = ip
  end

  # How much memory a provider gives is all that may be said of one.
  def provider(_name)
    yield Struct.new(:memory).new
  end

  # Outside in: what is said of all machines comes first, wherever it stands.
  def define(name)
    @machines[name] = Said.new([])
    yield @machines[name]
  end
end

module Vagrant
  def self.configure(_version)
    all = Said.new([])
    yield all
    puts JSON.generate(all.machines.transform_values { |one|
      { hostname: one.hostname, address: one.address, provisions: all.provisions + one.provisions }
    })
  end
end

load File.expand_path(ARGV.fetch(0))
